"""Searches kept to passages that meet conditions find what brute force finds among those."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from toolkit.errors import UsageError
from toolkit.rag import Encoder, Lexical, Message, Passage, Retriever, ask, build_index, find_corpus
from toolkit.rag.filters import Condition

ROWS = [
    {"title": f"note {i}", "text": f"Text number {i * 31} on gardens.", "year": 2000 + i,
     "lang": "en" if i % 2 else "de", "draft": i % 3 == 0, "tags": ["x"]}
    for i in range(20)
]  # fmt: skip


@pytest.fixture(scope="module")
def retriever(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    folder = tmp_path_factory.mktemp("filters")
    source = folder / "notes.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    corpus = find_corpus(str(source), meta_fields=["year", "lang", "draft", "tags", "missing"])
    build_index(corpus, folder / "index", Encoder.load(str(tiny_dir)), num_lists=4)
    return Retriever.open(folder / "index")


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        (["year>=2015"], [*range(15, 20)]),
        (["year < 2003", "lang=de"], [0, 2]),
        (["lang!=de", "draft=true"], [3, 9, 15]),
        (["title=note 1*", "source=*.jsonl"], [1, *range(10, 20)]),
        (["year=2007"], [7]),
    ],
)
def test_only_what_meets_all_conditions_is_found(
    retriever: Retriever, where: list[str], kept: list[int]
) -> None:
    hits = retriever.search("gardens", k=50, nprobe=4, where=where)
    assert sorted(hit.passage.id for hit in hits) == kept
    every = retriever.search("gardens", k=50, nprobe=4)
    assert [hit for hit in every if hit.passage.id in kept] == hits
    assert hits[0].passage.meta["year"] == 2000 + hits[0].passage.id
    assert "tags" not in hits[0].passage.meta


def test_answers_rest_on_what_meets_the_conditions(retriever: Retriever) -> None:
    class Says:
        def stream(self, messages: Sequence[Message], *, max_tokens: int = 256) -> Iterator[str]:
            yield "Gardens."

    pytest.importorskip("bm25s")
    words = Lexical.open(retriever)
    for pipeline in ("plain", "hyde"):
        answer = ask(
            retriever, Says(), "Gardens?", pipeline=pipeline, where=["year<2002"], min_score=-1,
            lexical=words,
        )  # fmt: skip
        assert {hit.passage.id for hit in answer.hits} == {0, 1}


def test_what_is_no_condition_is_said(retriever: Retriever) -> None:
    with pytest.raises(UsageError, match="'year' is no condition; write FIELD=PATTERN"):
        retriever.search("x", where=["year"])
    with pytest.raises(UsageError, match="no passage meets lang=fr and year>1"):
        retriever.search("x", where=["lang=fr", "year>1"])
    passage = Passage(0, "a.md", "t", "x", 1, 1, {"level": "high"})
    assert Condition.parse("level>=a").holds(passage)  # text is compared as text
    assert not Condition.parse("other!=a").holds(passage)
