"""Passages: they cover the text, know their lines, and are the same every time."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import UsageError
from toolkit.rag.corpus import Document, Passage, num_words, passages, split

_LINES = st.lists(
    st.text(alphabet="abcAB .!?\t()\"'1-é", max_size=60) | st.just("") | st.just("x" * 300),
    min_size=1,
    max_size=30,
)


def _document(lines: list[str]) -> Document:
    # Every line stands on its own stretch of the source, wider than one line.
    return Document.of_lines(
        "book.txt", "Book", [(line, 3 * i + 1, 3 * i + 2) for i, line in enumerate(lines)]
    )


@given(_LINES, st.integers(1, 40))
def test_passages_cover_every_word_once_and_in_order(lines: list[str], words: int) -> None:
    document = _document(lines)
    found = list(split(document, words=words))
    assert "".join("".join(p.text.split()) for p in found) == "".join(document.text.split())
    assert all(0 < num_words(p.text) <= words for p in found)
    assert [p.id for p in found] == list(range(len(found)))


@given(_LINES, st.integers(2, 40), st.data())
def test_lines_are_those_of_the_source(lines: list[str], words: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, words - 1))
    for passage in split(_document(lines), words=words, overlap=overlap):
        # Undo the numbering of _document, and look the passage up where it says it stands.
        first, last = (passage.start_line - 1) // 3, (passage.end_line - 2) // 3
        assert passage.start_line == 3 * first + 1
        assert passage.end_line == 3 * last + 2
        assert passage.text in "\n".join(lines[first : last + 1])
        assert passage.text.count("\n") == last - first
        assert num_words(passage.text) <= words


@given(st.lists(st.sampled_from([" ", ". A", "\n", "\n\n"])), st.integers(2, 20), st.data())
def test_overlap_repeats_only_the_end_of_the_passage_before(
    gaps: list[str], words: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(1, words - 1))
    text = "".join(f"{number}{gap}" for number, gap in enumerate([*gaps, "."]))
    covered = -1
    for passage in split(_document(text.split("\n")), words=words, overlap=overlap):
        numbers = [int(number) for number in re.findall(r"\d+", passage.text)]
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert covered - overlap < numbers[0] <= covered + 1
        assert numbers[-1] > covered, "nothing new"
        covered = numbers[-1]
    assert covered == len(gaps)


def test_overlap_is_used() -> None:
    text = "One two three. Four five six. Seven eight nine. Ten eleven twelve."
    document = Document("a", "", text, (1,), (1,))
    found = [p.text for p in split(document, words=6, overlap=3)]
    assert found == [
        "One two three. Four five six.",
        "Four five six. Seven eight nine.",
        "Seven eight nine. Ten eleven twelve.",
    ]


def test_sentences_and_paragraphs_are_kept_whole() -> None:
    text = "Use e.g. version 3.11 here. It works.\n\nA new paragraph begins. It is short."
    document = Document("a", "", text, (1, 2, 3), (1, 2, 3))
    assert [p.text for p in split(document, words=8)] == [
        "Use e.g. version 3.11 here. It works.",
        "A new paragraph begins. It is short.",
    ]


def test_code_keeps_its_indentation() -> None:
    text = "Example:\n\n    if x:\n        return y"
    document = Document("a", "", text, (1, 2, 3, 4), (1, 2, 3, 4))
    assert [p.text for p in split(document, words=2)] == [
        "Example:",
        "    if x:",
        "        return y",
    ]


def test_duplicates_are_dropped_and_ids_stay_consecutive() -> None:
    def copy(source: str, text: str) -> Document:
        return Document.of_lines(source, "T", [(text, 1, 1)])

    documents = [copy("a", "Same text."), copy("b", "Same   text."), copy("c", "Other text.")]
    found = list(passages(documents))
    assert [(p.id, p.source) for p in found] == [(0, "a"), (1, "c")]
    assert [p.source for p in passages(documents, limit=1)] == ["a"]


def test_a_title_is_embedded_with_the_text() -> None:
    assert Passage(0, "a", "Title", "Text", 1, 1).embedded == "Title\nText"
    assert Passage(0, "a", "", "Text", 1, 1).embedded == "Text"


@pytest.mark.parametrize(("words", "overlap"), [(0, 0), (5, 5), (5, -1)])
def test_impossible_sizes_are_refused(words: int, overlap: int) -> None:
    with pytest.raises(UsageError, match="impossible"):
        list(split(Document.of_lines("a", "", []), words=words, overlap=overlap))


def test_a_document_knows_if_its_lines_do_not_fit() -> None:
    with pytest.raises(ValueError, match="2 lines"):
        Document("a", "", "one\ntwo", (1,), (1,))
