"""How many lists, probes and bytes of memory an index should have: measured here, then reckoned.

Measured: recall against exact search by probes, the disk's speed at this index's lists, and, when
there is one, the generator's. Predicted from them: how long a cold search reads, and how much of
that a generation hides.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from toolkit import units
from toolkit.errors import UsageError
from toolkit.rag import evaluate
from toolkit.rag.build import default_num_lists
from toolkit.rag.generator import Generator
from toolkit.rag.retriever import Retriever
from toolkit.rag.session import Clock
from toolkit.rag.store import Key

_TOKENS = 64  # of a generation that leads to a search: HyDE's
# Direct reads are at their best from here on; far larger lists are read in pieces anyway.
_LEAST_READ_BYTES = 256 * units.KIB


@dataclass(frozen=True)
class Advice:
    """What was measured on an index, and what follows from it."""

    num_vectors: int
    num_lists: int
    list_bytes: int  # median
    index_bytes: int
    recalls: tuple[evaluate.Recall, ...]  # measured
    disk_bytes_per_s: float  # measured, direct reads of whole lists
    token_s: float | None  # measured, when there was a generator
    target: float
    nprobe: int  # the fewest probes measured to reach the target
    num_lists_wanted: int
    probed_bytes: int  # of a search with that many probes, mean
    cold_s: float  # predicted: reading them
    window_s: float | None  # predicted: a generation of 64 tokens
    memory_bytes: int  # in which the lists of a lookahead and of a search have room

    @property
    def advice(self) -> tuple[str, ...]:
        """What to do, a sentence each."""
        out = [f"search {self.nprobe} lists (--nprobe {self.nprobe})"]
        if self.memory_bytes >= self.index_bytes:
            size = units.format_bytes(self.index_bytes)
            out.append(f"give it {size} of memory: all of it, and no list is read twice")
        else:
            out.append(
                f"give it at least {units.format_bytes(self.memory_bytes)} of memory "
                f"(--memory {-(-self.memory_bytes // units.MIB)}MiB)"
            )
        if self.num_lists > 2 * self.num_lists_wanted:
            out.append(
                f"build with fewer lists (--nlist {self.num_lists_wanted}): these are too small "
                "for long reads, or for k-means to have learnt them"
            )
        elif 2 * self.num_lists < self.num_lists_wanted:
            out.append(
                f"build with more lists (--nlist {self.num_lists_wanted}): fewer bytes a search"
            )
        if self.window_s is None:
            out.append("give --url to learn what lookahead can hide")
        elif self.cold_s > 2 * self.window_s:
            out.append(
                "a cold search reads longer than a generation lasts: --encoding f16 or sq8 halves "
                "or quarters its bytes"
            )
        elif self.cold_s < 0.05 * self.window_s:
            out.append("reading is short beside generating: lookahead will hardly be noticed")
        else:
            out.append("lookahead can hide most of a cold search behind a generation")
        return tuple(out)


def advise(
    retriever: Retriever,
    queries: Sequence[str],
    *,
    target: float = 0.95,
    k: int = 10,
    generator: Generator | None = None,
    clock: Clock = time.perf_counter,
) -> Advice:
    """Measure an index with real queries, and return what its settings should be.

    `target` is the recall@k wanted. Reads every list that exact search needs, so it takes as long
    as reading the index a few times over. Raises UsageError without queries.
    """
    if not 0 < target <= 1:
        raise UsageError(f"a recall of {target} is wanted", remedy="ask for more than 0, at most 1")
    store = retriever.store
    recalls = evaluate.recall(retriever, queries, k=k, clock=clock)
    nprobe = next(each.nprobe for each in recalls if each.recall >= target)
    disk = _disk_bytes_per_s(retriever, clock)
    token_s = _token_s(generator, clock) if generator else None
    sizes = sum((each.sizes for each in store.segments), np.zeros(retriever.num_lists, np.int64))
    probes = [retriever.rank(retriever.vector(query), nprobe) for query in queries]
    probed_bytes = int(np.mean([sizes[each].sum() for each in probes]))
    window_s = token_s * _TOKENS if token_s else None
    ahead_bytes = min(2.0 * probed_bytes, disk * window_s if window_s else 2.0 * probed_bytes)
    per_vector = sum(map(int, sizes)) / max(1, store.num_vectors)
    wanted = min(
        default_num_lists(store.num_vectors),
        max(1, int(store.num_vectors * per_vector // _LEAST_READ_BYTES)),
    )
    return Advice(
        num_vectors=store.num_vectors,
        num_lists=retriever.num_lists,
        list_bytes=int(np.median(sizes)),
        index_bytes=store.num_bytes_held,
        recalls=tuple(recalls),
        disk_bytes_per_s=disk,
        token_s=token_s,
        target=target,
        nprobe=nprobe,
        num_lists_wanted=wanted,
        probed_bytes=probed_bytes,
        cold_s=probed_bytes / disk,
        window_s=window_s,
        memory_bytes=int(max(probed_bytes + ahead_bytes, sizes.max())),
    )


def _disk_bytes_per_s(retriever: Retriever, clock: Clock) -> float:
    """Read lists in no order, past all caches; return the bytes a second."""
    tiers, store = retriever.tiers, retriever.store
    keys = store.keys(np.random.default_rng(0).permutation(retriever.num_lists))
    most = min(256 * units.MIB, tiers.arena.budget_bytes // 2)
    tiers.clear()
    size = 0
    chosen: list[Key] = []
    for key in keys:
        if chosen and size + store.num_bytes(key) > most:
            break
        size += store.num_bytes(key)
        chosen.append(key)
    start_s = clock()
    with tiers.demand(chosen) as demand:
        for _ in demand:
            pass
    return size / max(clock() - start_s, 1e-9)


def _token_s(generator: Generator, clock: Clock) -> float:
    """Return the seconds between two pieces of a stream, the first one left out."""
    message = {"role": "user", "content": "Count from one to fifty in words."}
    times = [clock() for _ in generator.stream([message], max_tokens=_TOKENS)]
    if len(times) < 2:
        raise UsageError("the model said nothing, so its pace is not known")
    return (times[-1] - times[0]) / (len(times) - 1)
