"""How much of the exact result a search finds, and what looking into more lists costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from toolkit.errors import UsageError
from toolkit.rag.retriever import Retriever
from toolkit.rag.session import Clock


@dataclass(frozen=True)
class Recall:
    """Measured over a set of queries: the mean share of the exact best k that nprobe lists hold."""

    nprobe: int
    k: int
    recall: float
    scanned: float  # share of all vectors that were looked at, mean over queries
    search_s: float  # median time of rank and scan, without the embedding


def recall(
    retriever: Retriever,
    queries: Sequence[str],
    *,
    k: int = 10,
    nprobes: Sequence[int] | None = None,
    clock: Clock = time.perf_counter,
) -> list[Recall]:
    """Compare searches of a few lists with the search of all of them, for real queries.

    `nprobes` defaults to powers of two and the index's own nprobe.
    """
    if not queries:
        raise UsageError("no queries to evaluate with")
    index = retriever.index
    num_lists = index.manifest.num_lists
    if nprobes is None:
        powers = {2**i for i in range(num_lists.bit_length()) if 2**i < num_lists}
        nprobes = sorted(powers | {index.manifest.nprobe, num_lists})
    for nprobe in nprobes:
        retriever.probes(nprobe)
    sizes = index.list_sizes()
    vectors = [retriever.vector(query) for query in queries]
    every = [index.rank(vector, num_lists) for vector in vectors]
    exact = [
        set(index.scan(v, lists, k)[1].tolist()) for v, lists in zip(vectors, every, strict=True)
    ]
    out = []
    for nprobe in nprobes:
        shares, scanned, seconds = [], [], []
        for vector, truth in zip(vectors, exact, strict=True):
            start_s = clock()
            lists = index.rank(vector, nprobe)
            _, ids = index.scan(vector, lists, k)
            seconds.append(clock() - start_s)
            shares.append(len(truth.intersection(ids.tolist())) / len(truth))
            scanned.append(sizes[lists].sum() / sizes.sum())
        means = (float(np.mean(shares)), float(np.mean(scanned)), float(np.median(seconds)))
        out.append(Recall(nprobe, k, *means))
    return out


def sample_titles(retriever: Retriever, num_queries: int, *, seed: int = 0) -> list[str]:
    """Return titles of passages, each once, as queries for an index nobody has asked yet.

    Titles are short and on the corpus's subjects, but easier than questions: they are part of what
    was embedded. They measure the index (recall against exact search), not the encoder.
    """
    passages = retriever.index.passages
    drawn = np.random.default_rng(seed).permutation(len(passages))
    titles: dict[str, None] = {}
    for i in drawn:
        title = passages[int(i)].title
        if title:
            titles.setdefault(title)
        if len(titles) == num_queries:
            break
    return list(titles)
