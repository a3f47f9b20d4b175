"""What a search finds: of the exact result by the lists probed, and of what is labelled right."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from toolkit.errors import FormatError, UsageError
from toolkit.rag.retriever import Hit, Retriever
from toolkit.rag.search import search
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
    num_lists = retriever.num_lists
    default = retriever.probes()
    if nprobes is None:
        powers = {2**i for i in range(num_lists.bit_length()) if 2**i < num_lists}
        nprobes = sorted(powers | {default, num_lists})
    for nprobe in nprobes:
        retriever.probes(nprobe)
    nums = retriever.store.list_nums()
    vectors = [retriever.vector(query) for query in queries]

    def ids(vector: np.ndarray, nprobe: int) -> set[int]:
        lists = retriever.rank(vector, nprobe)
        return set(search(retriever.tiers, vector[None], [lists], k).found[0].ids.tolist())

    exact = [ids(vector, num_lists) for vector in vectors]
    out = []
    for nprobe in nprobes:
        shares, scanned, seconds = [], [], []
        for vector, truth in zip(vectors, exact, strict=True):
            start_s = clock()
            found = ids(vector, nprobe)
            seconds.append(clock() - start_s)
            shares.append(len(truth & found) / len(truth))
            scanned.append(nums[retriever.rank(vector, nprobe)].sum() / nums.sum())
        means = (float(np.mean(shares)), float(np.mean(scanned)), float(np.median(seconds)))
        out.append(Recall(nprobe, k, *means))
    return out


@dataclass(frozen=True)
class Label:
    """A query, and the titles of the passages that answer it."""

    query: str
    relevant: tuple[str, ...]


@dataclass(frozen=True)
class Quality:
    """Measured over labelled queries, means: binary relevance, the best `k` passages."""

    num_queries: int
    k: int
    recall: float  # of the relevant passages
    ndcg: float  # Jarvelin and Kekalainen 2002, with gains 0 and 1
    success: float  # queries with at least one relevant passage


def read_labels(path: Path) -> list[Label]:
    """Read a JSON Lines file of {"query": text, "relevant": [titles]}."""
    labels: list[Label] = []
    number = 0
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            number += 1
            if line.strip():
                fields = json.loads(line)
                labels.append(Label(str(fields["query"]), tuple(map(str, fields["relevant"]))))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"{path}, line {number}: not a label ({error})",
            remedy='write {"query": "...", "relevant": ["title", ...]} a line',
        ) from error
    return labels


def quality(
    retriever: Retriever,
    labels: Sequence[Label],
    search_for: Callable[[str, int], list[Hit]],
    *,
    k: int = 10,
) -> Quality:
    """Return how well `search_for(query, k)` finds the labelled passages.

    Titles are compared without case. Queries none of whose titles the index holds are left out;
    raises UsageError when that is all of them.
    """
    counts: dict[str, int] = {}
    for passage in retriever.store.passages():
        if not retriever.store.is_deleted(passage.id):
            title = passage.title.lower()
            counts[title] = counts.get(title, 0) + 1
    recalls, gains, successes = [], [], []
    for label in labels:
        titles = {title.lower() for title in label.relevant}
        total = sum(counts.get(title, 0) for title in titles)
        if not total:
            continue
        right = [hit.passage.title.lower() in titles for hit in search_for(label.query, k)]
        ideal = sum(1 / math.log2(rank + 2) for rank in range(min(total, k)))
        found = sum(1 / math.log2(rank + 2) for rank, hit in enumerate(right) if hit)
        recalls.append(sum(right) / total)
        gains.append(found / ideal)
        successes.append(any(right))
    if not recalls:
        raise UsageError("the index holds no passage with a title that the labels name")
    means = (float(np.mean(each)) for each in (recalls, gains, successes))
    return Quality(len(recalls), k, *means)


def sample_titles(retriever: Retriever, num_queries: int, *, seed: int = 0) -> list[str]:
    """Return titles of passages, each once, as queries for an index nobody has asked yet.

    Titles are short and on the corpus's subjects, but easier than questions: they are part of what
    was embedded. They measure the index (recall against exact search), not the encoder.
    """
    store = retriever.store
    drawn = np.random.default_rng(seed).permutation(store.manifest.next_id)
    titles: dict[str, None] = {}
    for i in drawn:
        if not store.is_deleted(int(i)) and (title := store.passage(int(i)).title):
            titles.setdefault(title)
        if len(titles) == num_queries:
            break
    return list(titles)
