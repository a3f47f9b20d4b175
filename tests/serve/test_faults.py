"""Faults: keys, sizes, engines that die or hang; the others are served, and nothing leaks."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from toolkit.serve.server.app import Doorkeeping
from toolkit.serve.server.service import Patience

Start = Callable[..., Any]


def test_keys(start: Start) -> None:
    served = start(door=Doorkeeping(api_keys=("first", "second")))
    with pytest.raises(openai.AuthenticationError) as caught:
        served.ask()
    assert caught.value.code == "invalid_api_key"
    keyed = openai.OpenAI(base_url=f"{served.url}/v1", api_key="second", max_retries=0)
    assert keyed.models.list().data
    for path, status in (("/health", 200), ("/metrics", 200), ("/", 200), ("/timeline", 401)):
        assert httpx.get(f"{served.url}{path}").status_code == status
    assert httpx.post(f"{served.url}/tokenize", json={"prompt": "a"}).status_code == 401


def test_a_line_for_each_request(start: Start) -> None:
    records: list[logging.LogRecord] = []
    kept = logging.Handler()
    kept.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("toolkit.serve.server.request_log")
    logger.addHandler(kept)
    served = start(door=Doorkeeping(log_requests=True, api_keys=("none",)))
    try:
        whole = served.ask(prompt=["a b", "c"], n=2, temperature=1.0)
        streamed = list(served.ask(stream=True))
        embedded = served.client.embeddings.create(model="tiny", input="Hello there")
        with pytest.raises(openai.BadRequestError):
            served.ask(prompt=5)
        httpx.post(f"{served.url}/v1/completions", json={})
        httpx.get(f"{served.url}/health")
        served.until(lambda: len(records) == 5)
    finally:
        logger.removeHandler(kept)
    found: list[Any] = [vars(record)["fields"] for record in records]
    assert [line["status"] for line in found] == [200, 200, 200, 400, 401]
    assert [line["id"] for line in found[:2]] == [whole.id, streamed[0].id]
    assert found[0]["prompt_tokens"] == whole.usage.prompt_tokens
    assert found[0]["output_tokens"] == whole.usage.completion_tokens
    assert [line["finish"] for line in found[:3]] == ["length"] * 3
    assert 0 < found[0]["ttft_ms"] <= found[0]["total_ms"]
    assert found[2]["prompt_tokens"] == embedded.usage.prompt_tokens
    assert (found[2]["endpoint"], found[2]["output_tokens"]) == ("/v1/embeddings", 0)
    said = records[0].getMessage()
    assert said.startswith(f"request id={whole.id} endpoint=/v1/completions status=200")


def test_pages_of_other_origins(start: Start) -> None:
    door = Doorkeeping(api_keys=("key",), origins=("https://chat.example",))
    served = start(door=door)
    url, ask = f"{served.url}/v1/models", {"access-control-request-method": "GET"}
    asked = ask | {"access-control-request-headers": "authorization"}
    for origin, status in (("https://chat.example", 200), ("https://other.example", 400)):
        preflight = httpx.options(url, headers=asked | {"origin": origin})
        assert preflight.status_code == status
    own = {"origin": "https://chat.example"}
    for headers, status in ((own, 401), (own | {"authorization": "Bearer key"}, 200)):
        answered = httpx.get(url, headers=headers)
        assert answered.status_code == status
        # Errors must be readable, too.
        assert answered.headers["access-control-allow-origin"] == "https://chat.example"


def test_bodies_too_large_or_too_deep(start: Start) -> None:
    served = start(door=Doorkeeping(max_body_bytes=20_000))
    url, kind = f"{served.url}/v1/completions", {"content-type": "application/json"}
    large = b'{"model": "tiny", "prompt": "' + b"a" * 30_000 + b'"}'
    chunks = (large[at : at + 1000] for at in range(0, len(large), 1000))
    deep = b'{"model": "tiny", "prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}"
    for content, status in ((large, 413), (chunks, 413), (deep, 400), (b"\xff{", 400)):
        answered = httpx.post(url, content=content, headers=kind)
        assert answered.status_code == status, answered.text
        assert answered.json()["error"]["message"]
    assert served.ask().choices


def test_an_engine_that_dies_is_told_and_replaced(start: Start) -> None:
    served = start()
    served.executor.gate.clear()
    stream = served.ask(stream=True)
    served.executor.faults.append("the executor was killed")
    served.executor.gate.set()
    with pytest.raises(openai.APIError, match="the executor was killed"):
        list(stream)
    served.until(lambda: httpx.get(f"{served.url}/health").status_code == 200)
    assert served.ask().choices[0].finish_reason == "length"
    assert served.metric("toolkit:engine_restarts_total") == 1
    # What was counted before the fault is counted still.
    assert served.metric("vllm:request_success_total", finished_reason="length") == 1
    assert served.metric("vllm:kv_cache_usage_perc") == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_dies_again_and_again_ends_the_server(start: Start) -> None:
    served = start()
    served.executor.faults += ["fault"] * 4
    for number in range(4):
        assert served.thread.is_alive(), f"it ended after {number} faults"
        with pytest.raises(openai.InternalServerError, match="fault"):
            served.ask()
    served.thread.join(30)
    assert not served.thread.is_alive()
    assert "4 faults within 10 minutes, the last: the engine has died: RuntimeError: fault" in str(
        served.service.lost
    )


def test_an_engine_that_hangs_is_given_up(start: Start) -> None:
    served = start(patience=Patience(unhealthy_s=0.2, replace_s=2.0))
    served.ask()
    held = threading.Event()
    first = served.executor.gate
    first.clear()
    errors: list[openai.APIError] = []

    def hold() -> None:
        with contextlib.suppress(openai.APIError):
            try:
                served.ask()
            except openai.APIError as error:
                errors.append(error)
        held.set()

    threading.Thread(target=hold).start()
    # Its successor waits at a gate of its own, which is open.
    fresh = threading.Event()
    fresh.set()
    served.until(lambda: served.metric("vllm:num_requests_running") == 1)
    served.executor.gate = fresh
    assert held.wait(30)
    assert "hung in one step" in str(errors[0])
    served.until(lambda: httpx.get(f"{served.url}/health").status_code == 200)
    assert served.ask().choices
    # When the old step comes back after all, nobody hears of it.
    first.set()
    assert served.ask().choices
    assert served.metric("toolkit:engine_restarts_total") == 1


def test_clients_that_come_and_go_leave_nothing_behind(served: Any) -> None:
    def leave(number: int) -> None:
        with contextlib.suppress(openai.APIError, httpx.HTTPError):
            stream = served.ask(
                prompt=f"{number} bottles", max_tokens=400, stream=True, n=2, temperature=1.0
            )
            for _ in range(number % 4):
                next(iter(stream))
            stream.close()

    threads = [threading.Thread(target=leave, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    served.until(lambda: not served.service.engine.has_work)
    scheduler = served.service.engine.scheduler
    scheduler.check_integrity()
    assert scheduler.pool.num_used == 0
    served.until(lambda: not served.service._calls)
    assert not served.service.engine._streams


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-310, "top_p": 0.5},
        {"temperature": 2, "top_p": 1e-300, "extra_body": {"min_p": 1}},
        {"logit_bias": {"5": 100, "6": -100}, "temperature": 1e-5},
        {"extra_body": {"repetition_penalty": 0.01, "top_k": 10**9}, "temperature": 1},
        {"extra_body": {"stop_token_ids": list(range(49_152)), "min_tokens": 2}, "temperature": 1,
         "top_p": 0.9},
        {"logit_bias": {"49152": 1}},
        {"extra_body": {"stop_token_ids": [-1], "min_tokens": 2}},
        {"extra_body": {"guided_grammar": 'root ::= "a" root'}, "top_p": 0.9, "temperature": 1},
        {"prompt": ["a"] * 300},
    ],
    ids="+".join,
)  # fmt: skip
def test_extreme_values_hurt_nobody_else(served: Any, options: dict[str, Any]) -> None:
    with contextlib.suppress(openai.BadRequestError):
        served.ask(**options)
    assert served.ask().choices
    assert served.metric("toolkit:engine_restarts_total") == 0


def test_a_template_is_not_the_clients_to_choose(served: Any) -> None:
    for key in ("chat_template", "tools", "tokenize"):
        answered = httpx.post(
            f"{served.url}/v1/chat/completions",
            json={
                "model": "tiny",
                "messages": [{"role": "user", "content": "a"}],
                "chat_template_kwargs": {key: "x"},
            },
        )
        assert answered.status_code == 400
