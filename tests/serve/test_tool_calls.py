"""Calls read out of text, however the text is cut; what is no call stays text."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.serve.server.tool_calls import (
    CallPiece,
    CallReader,
    HermesReader,
    ListReader,
    LlamaReader,
    whole_calls,
)

HERMES = (
    'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>\n'
    '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
)
LLAMA = '{"name": "f", "parameters": {"x": "é"}}; {"name": "g", "parameters": {}}'
LIST = '[{"name": "f", "arguments": {"x": "é"}},\n {"name": "g", "arguments": {}}]'


def read(reader: CallReader, parts: list[str]) -> tuple[str, list[tuple[str, object]]]:
    pieces = [piece for part in parts for piece in reader.push(part)] + reader.flush()
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    calls = whole_calls([piece for piece in pieces if isinstance(piece, CallPiece)])
    assert len({call["id"] for call in calls}) == len(calls)
    return text, [
        (call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls
    ]


def cut(text: str, places: list[int]) -> list[str]:
    at = sorted({0, len(text), *(place % len(text) for place in places)})
    return [text[a:b] for a, b in itertools.pairwise(at)]


@given(st.lists(st.integers(0, 10_000), max_size=30))
def test_calls_are_found_however_the_text_is_cut(places: list[int]) -> None:
    calls = [("f", {"x": "é"}), ("g", {})]
    assert read(HermesReader(), cut(HERMES, places)) == ("Let me see.\n\n", calls)
    assert read(LlamaReader(), cut(LLAMA, places)) == ("", calls)
    assert read(ListReader(), cut(LIST, places)) == ("", calls)


@pytest.mark.parametrize(
    "text", ["plain", "a < b", "<tool_call>not json</tool_call>", '<tool_call>{"x": 1}</tool_call>',
             "tail <tool", '{"x": 1}', "{broken", '{"name": "f"} and more'],
)  # fmt: skip
@pytest.mark.parametrize("kind", [HermesReader, LlamaReader])
def test_what_is_no_call_stays_text(kind: type[HermesReader | LlamaReader], text: str) -> None:
    assert read(kind(), list(text)) == (text, [])


def test_text_is_not_held_back_longer_than_needed() -> None:
    reader = HermesReader()
    assert reader.push("one <") == ["one "]
    assert reader.push(" two") == ["< two"]
    assert LlamaReader().push("plain") == ["plain"]


def test_a_turn_may_end_without_the_closing_tag() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": 1}}'
    assert read(HermesReader(), [text]) == ("", [("f", {"a": 1})])
