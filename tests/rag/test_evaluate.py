"""Recall against exact search is what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.errors import UsageError
from toolkit.rag import Retriever
from toolkit.rag.evaluate import recall, sample_titles

QUERIES = ["spade", "snails at night", "bread dough", "frost"]


def test_recall_grows_to_one(garden_index: Path) -> None:
    retriever = Retriever.open(garden_index)
    # One list holds everything in so small an index; this one is divided by hand.
    assert retriever.index.manifest.num_lists == 1
    (found,) = recall(retriever, QUERIES, k=3)
    assert (found.nprobe, found.recall, found.scanned) == (1, 1.0, 1.0)


def test_recall_counts_what_the_lists_hold(
    garden: Path, tiny_dir: Path, tmp_path: Path
) -> None:  # fmt: skip
    from toolkit.rag import Encoder, build_index, find_corpus

    build_index(
        find_corpus(str(garden)), tmp_path / "index", Encoder.load(str(tiny_dir)),
        passage_words=8, num_lists=4, nprobe=2,
    )  # fmt: skip
    retriever = Retriever.open(tmp_path / "index")
    found = recall(retriever, QUERIES, k=3, nprobes=[1, 2, 4])
    assert [each.recall for each in found] == sorted(each.recall for each in found)
    assert (found[-1].recall, found[-1].scanned) == (1.0, 1.0)
    exact = [{hit.passage.id for hit in retriever.search(q, 3, 4)} for q in QUERIES]
    near = [{hit.passage.id for hit in retriever.search(q, 3, 1)} for q in QUERIES]
    share = sum(len(a & b) / 3 for a, b in zip(exact, near, strict=True)) / len(QUERIES)
    assert found[0].recall == pytest.approx(share)
    assert [each.nprobe for each in recall(retriever, QUERIES)] == [1, 2, 4]
    with pytest.raises(UsageError, match="use 1 to 4"):
        recall(retriever, QUERIES, nprobes=[5])
    with pytest.raises(UsageError, match="no queries"):
        recall(retriever, [])


def test_titles_are_sampled_once_each(garden_index: Path) -> None:
    titles = sample_titles(Retriever.open(garden_index), 10)
    assert sorted(titles) == ["Bread & butter", "Frost", "Garden guide"]
    assert sample_titles(Retriever.open(garden_index), 10) == titles
    assert len(sample_titles(Retriever.open(garden_index), 2)) == 2
