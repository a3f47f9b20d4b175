"""Streamed text: whole characters, nothing of a stop string, and the same as decoded at once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from toolkit.errors import UsageError
from toolkit.serve.model.tokenizer import Tokenizer
from toolkit.serve.request import SamplingParams


def streamed(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[str, Any]:
    stream = tokenizer.stream([1, 2, 3], SamplingParams(stop=stop))
    text = ""
    for token in ids:
        text += stream.push(token)
        if stream.stopped:
            break
    return text + stream.flush(), stream


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text(max_size=60))
def test_streamed_text_is_the_decoded_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert streamed(tokenizer, ids)[0] == tokenizer.decode(ids)


def test_a_character_of_several_tokens_comes_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🧮")
    assert len(ids) > 1
    stream = tokenizer.stream([])
    assert [stream.push(token) for token in ids] == [*[""] * (len(ids) - 1), "🧮"]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("three",), "one two "),
        (("four", "two"), "one "),
        ((" tw",), "one"),
        (("absent",), "one two three four"),
        (("four five",), "one two three four"),
    ],
)
def test_text_ends_before_a_stop_string(
    tokenizer: Tokenizer, stop: tuple[str, ...], expected: str
) -> None:
    text, stream = streamed(tokenizer, tokenizer.encode("one two three four"), stop)
    assert text == expected
    assert stream.stopped == (expected != "one two three four")


def test_what_may_begin_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream([], SamplingParams(stop=("\n\nEND",)))
    shown = [stream.push(token) for token in tokenizer.encode("a\n\nEN")]
    assert "".join(shown) == "a"
    assert stream.flush() == "\n\nEN"


def test_chat_template(tokenizer: Tokenizer) -> None:
    ids = tokenizer.chat([{"role": "user", "content": "Hi"}])
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(UsageError, match="refuses"):
        tokenizer.chat([{"role": "user"}])


def test_stops_wait_for_the_least_number_of_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three two four")
    params = SamplingParams(stop=("two",), min_tokens=3, include_stop=True)
    stream = tokenizer.stream([], params)
    text = ""
    for token in ids:
        text += stream.push(token)
        if stream.stopped:
            break
    assert text == "one two three two"


@given(text=st.text(max_size=30))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    # This vocabulary lacks some bytes.
    assume(tokenizer.decode(ids) == text)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
