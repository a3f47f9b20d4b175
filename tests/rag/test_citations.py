"""What is shown of an answer, and what each of its sentences rests on."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.rag.citations import MARKER, attribute, sentences, support
from toolkit.rag.stream import MarkerFilter, RepeatFilter


def _filtered(text: str, num_passages: int, cut: int = 1) -> tuple[str, list[tuple[int, int]]]:
    markers = MarkerFilter(num_passages)
    pieces = [text[i : i + cut] for i in range(0, len(text), cut)]
    return "".join(markers.feed(piece) for piece in pieces) + markers.end(), markers.written


@pytest.mark.parametrize(
    ("text", "shown", "numbers"),
    [
        ("It closes [1].", "It closes [1].", [1]),
        ("It closes[2]. And [1, 3]", "It closes[2]. And [1, 3]", [2, 1, 3]),
        ("Unknown [4]. Both [3;9].", "Unknown. Both [3].", [3]),
        ("[4] begins", " begins", []),
        ("items[7] stays, items[2] cites", "items[7] stays, items[2] cites", [2]),
        ("in `x[1]` and ```\ny = [2]\n``` but [3]", "in `x[1]` and ```\ny = [2]\n``` but [3]", [3]),
        ("a list [1, two] and [", "a list [1, two] and [", []),
        ("cut in [1", "cut in [1", []),
        ("a run [1][7][2] and x[8][9]", "a run [1][2] and x[8][9]", [1, 2]),
        ("zero [0] and [00002]", "zero and [2]", [2]),
    ],
)
def test_markers_are_validated(text: str, shown: str, numbers: list[int]) -> None:
    found, written = _filtered(text, 3)
    assert found == shown
    assert [number for number, _ in written] == numbers


@given(
    st.lists(
        st.sampled_from(["[1]", "[2, 9]", "[9]", " ", "word", ".", "[", "]", "`", "\n", "12"])
    ),
    st.integers(1, 7),
)
def test_how_a_stream_is_cut_does_not_matter(parts: list[str], cut: int) -> None:
    text = "".join(parts)
    whole, written = _filtered(text, 2, cut=max(1, len(text)))
    assert _filtered(text, 2, cut) == (whole, written)
    for number, position in written:
        marker = MARKER.match(whole, position)
        assert marker
        assert str(number) in re.findall(r"\d+", marker[1])


@given(st.lists(st.sampled_from(["one two three four. ", "Five ", "six", "\n", "one two "])))
def test_repeats_end_the_text_and_nothing_else_changes(parts: list[str]) -> None:
    repeats = RepeatFilter()
    shown = "".join(repeats.feed(part) for part in parts) + repeats.end()
    text = "".join(parts)
    assert text.startswith(shown)
    assert repeats.repeated or shown == text


def test_a_loop_is_cut_before_it_is_shown() -> None:
    repeats = RepeatFilter()
    said = "The with statement closes files. The with statement opens files [1].\n\n"
    loop = "[1]. The with statement closes files [2]. And more."
    markers = MarkerFilter(num_passages=2)  # which lets markers through only whole
    shown = "".join(repeats.feed(markers.feed(character)) for character in said + loop)
    assert shown.rstrip() == said + "[1]."
    assert repeats.repeated
    assert repeats.end() == ""


def test_a_loop_that_the_token_limit_cuts_is_not_shown() -> None:
    repeats = RepeatFilter()
    shown = repeats.feed("It wraps a block of code. It wraps a block of")
    assert (shown + repeats.end(), repeats.repeated) == ("It wraps a block of code.", True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One here. [1] Two there [2].", ["One here. [1]", "Two there [2]."]),
        ("[1] One here.\n\n[2] Two there.", ["[1] One here.", "[2] Two there."]),
        ("[1]. One here. [2].", ["[1]. One here. [2]."]),
        ("A line\nthat wraps. Next!", ["A line\nthat wraps.", "Next!"]),
        ("Steps:\n- first\n- second", ["Steps:", "- first", "- second"]),
        ("", []),
    ],
)
def test_sentences_own_their_markers(text: str, expected: list[str]) -> None:
    assert [text[start:end] for start, end in sentences(text)] == expected


PASSAGES = [
    "Aphids are eaten by ladybirds, so do not spray.",
    "Snails eat lettuce at night; collect them by hand.",
]


def test_a_sentence_is_attributed_to_the_passage_that_holds_its_words() -> None:
    assert attribute("Collect snails by hand at night.", PASSAGES) == (1, 1.0)
    assert attribute("Ladybirds eat aphids in gardens.", PASSAGES) == (0, 0.5)
    assert attribute("Paris is the capital of France.", PASSAGES) is None
    assert attribute("It is so.", PASSAGES) is None
    assert attribute("Collect snails by hand.", []) is None


@given(st.text(), st.text())
def test_support_is_a_share(sentence: str, passage: str) -> None:
    assert 0 <= support(sentence, passage) <= 1
    assert support(sentence, sentence) in (0, 1)
