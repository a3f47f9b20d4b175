"""Programs over HTTP: calls named as their clients name them, seen, ordered and ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

Start = Callable[..., Any]


def programs(served: Any) -> dict[str, dict[str, Any]]:
    body = httpx.get(f"{served.url}/v1/programs").json()
    assert body["object"] == "list"
    return {row["id"]: row for row in body["data"]}


@pytest.mark.parametrize("policy", ["fcfs", "plas", "atlas"])
def test_calls_of_an_unmodified_client(start: Start, policy: str) -> None:
    served = start(policy=policy)
    plain = served.ask(max_tokens=5).choices[0].text
    for turn in range(3):
        named = {"extra_headers": {"X-Session-ID": "agent"}, "user": "ann"}
        assert served.ask(max_tokens=5, **named).choices[0].text == plain
        assert programs(served)["agent"]["num_calls"] == turn + 1
    row = programs(served)["agent"]
    assert row["state"] == "idle"
    assert row["num_tokens"] == 15
    assert row["num_open"] == 0
    assert row["service_s"] > 0
    # The one without a name is nobody's.
    assert set(programs(served)) == {"agent"}
    served.ask(extra_headers={"X-Session-ID": "agent", "X-Program-End": "true"})
    served.until(lambda: not programs(served))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("program_id", "a"),
        ("agent_hint", {"session_id": "a"}),
        ("vllm_xargs", {"agentic_context": "a"}),
        ("session_params", {"id": "a"}),
        ("nvext", {"session_control": {"session_id": "a"}}),
        ("prompt_cache_key", "a"),
        ("metadata", {"session_id": "a"}),
        ("user", "a"),
    ],
)
def test_every_way_to_name_one(served: Any, field: str, value: Any) -> None:
    served.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=2,
        extra_body={field: value},
    )  # fmt: skip
    assert programs(served)["a"]["num_calls"] == 1


def test_choices_are_calls_and_threads_are_counted(served: Any) -> None:
    served.ask(n=2, temperature=1.0, extra_body={"program_id": 7, "thread_id": "left"})
    served.ask(extra_body={"program_id": 7, "thread_id": "right"})
    row = programs(served)["7"]
    assert (row["num_calls"], row["num_threads"]) == (3, 2)


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 257, {"a": 1}])
def test_what_is_no_name(served: Any, name: Any) -> None:
    """Refused where a program is meant; OpenAI's own fields may hold anything."""
    with pytest.raises(openai.BadRequestError, match="program_id"):
        served.ask(extra_body={"program_id": name})
    served.ask(extra_body={"user": name, "metadata": {"session_id": name}})
    assert not programs(served)
