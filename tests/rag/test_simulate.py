"""Simulated machines: real rankings in, orders and bounds that must hold out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from toolkit.errors import UsageError
from toolkit.rag import Encoder, Message, Retriever, ask, build_index, find_corpus
from toolkit.rag.ranks import Round, ranks
from toolkit.rag.simulate import STORE_BYTES, Machine, machines, simulate

MACHINE = Machine("m", 1e12, 25e9, 20e9, 8e9)


def _rounds(num_tokens: int, foreseen: Sequence[Sequence[int]], probes: Sequence[int]) -> Round:
    return Round(num_tokens, tuple(map(tuple, foreseen)), tuple(probes))


def test_hits_follow_from_the_rankings() -> None:
    nums = np.ones(100)
    size = STORE_BYTES / 100
    window = 100  # tokens: 2.3 s, 57 GB of link, more than the pool
    good = [[_rounds(window, [range(20)] * 4, range(8))]]
    found = simulate(MACHINE, good, nums, mode="question")
    assert found.hit_rate == 1.0
    assert found.copied_bytes == pytest.approx(16 * size)  # twice the probes
    saved_s = 8 * size / MACHINE.scan - 8 * size / MACHINE.memory_bandwidth
    assert found.without_s - found.with_s == pytest.approx(saved_s)
    bad = [[_rounds(window, [range(50, 70)] * 4, range(8))]]
    assert simulate(MACHINE, bad, nums, mode="question").hit_rate == 0
    assert simulate(MACHINE, bad, nums, mode="question").speedup == pytest.approx(1.0)
    assert simulate(MACHINE, good, nums, mode="off").speedup == pytest.approx(1.0)
    # The text says more than the question: progressive finds what the question did not.
    late = [[_rounds(window, [range(50, 70), range(8), range(8), range(8)], range(8))]]
    assert simulate(MACHINE, late, nums, mode="progressive").hit_rate == 1.0


def test_window_pool_and_batch_bound_what_is_copied() -> None:
    nums = np.ones(100)
    size = STORE_BYTES / 100
    rounds = [[_rounds(8, [range(20)] * 4, range(8))]]
    found = simulate(MACHINE, rounds, nums, mode="question")
    assert 0 < found.hit_rate < 1
    assert found.copied_bytes <= 8 * MACHINE.token_s * MACHINE.link
    small = replace(MACHINE, pool_bytes=2.5 * size)
    assert simulate(small, rounds, nums, mode="question").hit_rate == pytest.approx(2 / 8)
    hits = [simulate(MACHINE, rounds, nums, mode="question", batch=b).hit_rate for b in (1, 2, 8)]
    assert hits == sorted(hits, reverse=True)
    with pytest.raises(UsageError, match="unknown machine"):
        machines(["a100"])
    assert len(machines()) == 5


def test_rankings_are_those_of_the_index(garden: Path, tiny_dir: Path, tmp_path: Path) -> None:
    class Says:
        def stream(self, messages: Sequence[Message], *, max_tokens: int = 256) -> Iterator[str]:
            yield from ("Spades ", "dig ", "the ", "beds.")

    path = tmp_path / "index"
    build_index(
        find_corpus(str(garden)), path, Encoder.load(str(tiny_dir)),
        passage_words=8, num_lists=6, nprobe=2,
    )  # fmt: skip
    retriever = Retriever.open(path)
    answer = ask(retriever, Says(), "Who digs?", pipeline="irg", min_score=-1)
    first, second, third = ranks(retriever, answer.recording, k=4, nprobe=2, depth=9)
    assert first == Round(0, (), tuple(sorted(retriever.rank(retriever.vector("Who digs?"), 2))))
    for each in (second, third):
        assert each.num_tokens == 4
        assert [len(ranking) for ranking in each.rankings] == [6] * 4
        half = retriever.vector("Who digs?", ["Spades dig "])
        assert each.rankings[2] == tuple(retriever.rank(half, 6))
        final = retriever.vector("Who digs?", ["Spades dig the beds."])
        assert each.probes == tuple(sorted(retriever.rank(final, 2)))
