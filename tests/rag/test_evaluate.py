"""Recall against exact search is what it says."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from toolkit.errors import FormatError, UsageError
from toolkit.rag import Encoder, Retriever, build_index, changes, find_corpus
from toolkit.rag.advise import advise
from toolkit.rag.evaluate import Label, quality, read_labels, recall, sample_titles

QUERIES = ["spade", "snails at night", "bread dough", "frost"]


def test_recall_grows_to_one(garden_index: Path) -> None:
    retriever = Retriever.open(garden_index)
    # One list holds everything in so small an index; this one is divided by hand.
    assert retriever.num_lists == 1
    (found,) = recall(retriever, QUERIES, k=3)
    assert (found.nprobe, found.recall, found.scanned) == (1, 1.0, 1.0)


def test_recall_counts_what_the_lists_hold(
    garden: Path, tiny_dir: Path, tmp_path: Path
) -> None:  # fmt: skip
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


def test_labels_are_judged_by_title(garden_index: Path, tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text(
        '{"query": "cold", "relevant": ["FROST", "unknown"]}\n\n{"query": "?", "relevant": ["x"]}'
    )
    labels = read_labels(file)
    assert labels == [Label("cold", ("FROST", "unknown")), Label("?", ("x",))]
    retriever = Retriever.open(garden_index)
    every = retriever.search("cold", k=50)
    frost = [hit for hit in every if hit.passage.title == "Frost"]
    others = [hit for hit in every if hit.passage.title != "Frost"]
    first = quality(retriever, labels, lambda query, k: (frost + others)[:k], k=3)
    assert (first.num_queries, first.ndcg, first.recall, first.success) == (1, 1.0, 1.0, 1.0)
    second = quality(retriever, labels, lambda query, k: [others[0], *frost], k=3)
    assert second.ndcg == pytest.approx(0.6309, abs=1e-4)  # 1 / log2(3)
    assert quality(retriever, labels, lambda query, k: others[:k], k=3).success == 0
    with pytest.raises(UsageError, match="no passage with a title"):
        quality(retriever, labels[1:], retriever.search)
    file.write_text('{"query": "cold"}')
    with pytest.raises(FormatError, match="line 1: not a label"):
        read_labels(file)


def test_advice_follows_from_what_was_measured(
    garden: Path, tiny_dir: Path, tmp_path: Path
) -> None:  # fmt: skip
    path = tmp_path / "index"
    build_index(
        find_corpus(str(garden)), path, Encoder.load(str(tiny_dir)),
        passage_words=8, num_lists=4, nprobe=2,
    )  # fmt: skip

    class Says:
        def stream(self, messages: object, *, max_tokens: int = 256) -> Iterator[str]:
            yield from ("one ", "two ", "three ")

    ticks = itertools.count()
    retriever = Retriever.open(path)
    found = advise(
        retriever, QUERIES, k=3, target=1.0, generator=Says(), clock=lambda: float(next(ticks))
    )
    assert found.nprobe == next(each.nprobe for each in found.recalls if each.recall == 1.0)
    assert found.token_s == 1.0
    assert found.disk_bytes_per_s == retriever.store.num_bytes_held  # in one tick
    assert found.cold_s == found.probed_bytes / found.disk_bytes_per_s
    assert "build with fewer lists (--nlist 1)" in " ".join(found.advice)
    assert "hardly be noticed" in found.advice[-1]
    with pytest.raises(UsageError, match="at most 1"):
        advise(retriever, QUERIES, target=2)
    changes.set_nprobe(path, 3)
    assert retriever.refresh()
    assert retriever.probes() == 3
    with pytest.raises(UsageError, match="nprobe 9 of 4 lists"):
        changes.set_nprobe(path, 9)
