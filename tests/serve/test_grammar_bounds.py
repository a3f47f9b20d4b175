"""Constraints of absurd size or nesting: refused within their bounds, and the server goes on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from toolkit.errors import UsageError
from toolkit.serve.grammar import Grammars
from toolkit.serve.grammar_compiler import Bounds, CompilerProcess
from toolkit.serve.model.tokenizer import Tokenizer
from toolkit.serve.queue import QueueFullError
from toolkit.serve.structured import Structured

# 54 characters that take minutes.
SLOW = "[a-z ]"
for _ in range(6):
    SLOW = f"({SLOW}){{0,30}}"
# Every text has so many readings that a token soon takes minutes.
AMBIGUOUS = 'root ::= s\ns ::= s s | s s s | "a" | ""'
CHAIN: dict[str, Any] = {
    f"d{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/d{i + 1}"}}}
    for i in range(5000)
}
CHAIN["d5000"] = {"type": "string"}
DEEP = json.dumps({"$defs": CHAIN, "$ref": "#/$defs/d0"})


@pytest.fixture(scope="module")
def narrow() -> Iterator[CompilerProcess]:
    """A compiler with little time and room."""
    made = CompilerProcess(Bounds(source_bytes=2**20, compile_s=3.0, compiled_bytes=2**22))
    yield made
    made.close()


def test_one_that_is_too_long_is_not_even_tried(tokenizer: Tokenizer) -> None:
    compiler = CompilerProcess(Bounds(source_bytes=1000))
    grammars = Grammars(tokenizer, 49_152, [2], compiler)
    with pytest.raises(UsageError, match=r"regex constraint is 1\.\d+ KiB long, and 1000 B is"):
        grammars.make(Structured("regex", "a" * 1500))
    assert compiler._process is None


def test_only_so_many_wait() -> None:
    compiler, gate = CompilerProcess(Bounds(waiting=3)), threading.Event()
    waiting = [compiler.submit(gate.wait) for _ in range(3)]
    with pytest.raises(QueueFullError, match="3 constraints wait"):
        compiler.submit(gate.wait)
    # Whoever leaves before its turn gives its place up.
    assert waiting.pop().cancel()
    waiting.append(compiler.submit(gate.wait))
    gate.set()
    assert all(each.result(10) for each in waiting)


def test_absurd_repetitions_that_compile(served: Any) -> None:
    """What is only written absurdly is kept; a schema as large as real ones is, too."""
    found = served.ask(max_tokens=6, extra_body={"guided_regex": "(a{1000}){1000}"})
    assert set(found.choices[0].text) == {"a"}
    schema = {"enum": [f"value {i}" for i in range(500)]}
    found = served.ask(max_tokens=40, extra_body={"guided_json": schema})
    assert json.loads(found.choices[0].text) in schema["enum"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Structured("regex", SLOW), "takes more than 3 s to compile, which is the bound"),
        (Structured("json", DEEP), "more than 1 GiB to compile, or is nested too deeply"),
        (
            Structured("regex", "ab" * 30_000),
            r"compiled it takes 1\d\.\d+ MiB, and 4 MiB is the bound",
        ),
        (Structured("grammar", AMBIGUOUS), "takes more than"),
        (Structured("regex", "(" * 5000 + "a" + ")" * 5000), "cannot be used"),
    ],
)
def test_beyond_the_bounds(
    tokenizer: Tokenizer, narrow: CompilerProcess, wanted: Structured, message: str
) -> None:
    grammars = Grammars(tokenizer, 49_152, [2], narrow)
    with pytest.raises(UsageError, match=message):
        grammars.make(wanted)
    assert not grammars.make(Structured("regex", "[ab]{5}")).ended


@pytest.mark.slow
def test_others_are_served_meanwhile(
    start: Callable[..., Any], narrow: CompilerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.serve.grammar.shared", lambda: narrow)
    served = start()
    served.ask(extra_body={"guided_regex": "a"})
    refused: list[openai.BadRequestError] = []

    def absurd() -> None:
        with pytest.raises(openai.BadRequestError) as error:
            served.ask(extra_body={"guided_regex": SLOW})
        refused.append(error.value)

    asking = threading.Thread(target=absurd)
    asking.start()
    time.sleep(0.5)
    for _ in range(5):
        assert served.ask().choices
    assert asking.is_alive()
    asking.join(30)
    assert "3 s to compile" in str(refused[0])
