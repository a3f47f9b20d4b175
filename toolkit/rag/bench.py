"""Five ways to the same passages, compared: what lookahead is worth here, and against what.

    faiss        FAISS's IVF with its lists on disk, mapped (OnDiskInvertedLists)
    off          this engine, every list read when the search asks for it
    question     + lookahead ranked once, by the question
    progressive  + ranked again on the text so far, the budget spent in instalments
    ram          this engine with all lists in memory before the question: the bound

Cold protocol: before each question the arena is emptied (reads are direct, so the page cache plays
no part), and FAISS's index is opened anew on a file whose pages were given up. The order is ABBA:
forwards for one question, backwards for the next. All five must find the same passages.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from toolkit.errors import ToolkitError, UsageError, require, unknown_name
from toolkit.rag import pipelines, prompts
from toolkit.rag.foresight import Mode
from toolkit.rag.generator import Generator
from toolkit.rag.prefetch import Ahead
from toolkit.rag.retriever import Hit, Retriever
from toolkit.rag.search import Found, Searched
from toolkit.rag.session import Session
from toolkit.rag.store import Store

Arm = Literal["faiss", "off", "question", "progressive", "ram"]
ARMS: tuple[Arm, ...] = ("faiss", "off", "question", "progressive", "ram")


@dataclass(frozen=True)
class Run:
    """One question through one arm (measured)."""

    arm: Arm
    question: str
    total_s: float  # from the question to the end of the answer
    wait_s: float  # of it, searches: from the end of a text to its passages, embedding included
    generate_s: float
    num_pieces: int  # of text, in all generations
    ids: tuple[int, ...]
    aheads: tuple[Ahead, ...]
    read_bytes: int


@dataclass(frozen=True)
class Summary:
    """All questions through one arm (measured)."""

    arm: Arm
    num_runs: int
    total_s: float  # medians, and 95th percentiles
    total_p95_s: float
    wait_s: float
    wait_p95_s: float
    piece_s: float  # generation, a piece: what prefetching slows
    hit_rate: float  # by bytes, over all lookaheads; of the last search where there are none
    budget_bytes: float  # means over lookaheads
    wasted_bytes: float
    read_bytes: float  # mean a question


class FaissOnDisk(Retriever):
    """FAISS's IVF over a copy of an index's lists, mapped from disk: the baseline.

    Same centroids, same codes, same probes, so the same passages.
    """

    def __init__(self, like: Retriever, folder: Path, *, threads: int) -> None:
        """Copy the lists into `folder` unless they are there already."""
        super().__init__(like.store, like.encoder, like.tiers)
        self._like = like
        self._folder = folder
        self._threads = threads
        self._index: Any = None
        if not (folder / "index.faiss").exists():
            _copy_lists(like.store, folder)

    def chill(self) -> None:
        """Open the index anew, with nothing of it in the page cache."""
        faiss = require("faiss", extra="rag")
        self._index = None  # unmaps it: pages that are mapped cannot be given up
        handle = os.open(self._folder / "lists.faiss", os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
        self._index = faiss.read_index(str(self._folder / "index.faiss"))
        self._index.parallel_mode = 1 if self._threads > 1 else 0

    def retrieve_many(
        self, vectors: Sequence[np.ndarray], k: int = 5, nprobe: int | None = None,
        *, among: Any = None,
    ) -> tuple[list[list[Hit]], Searched]:  # fmt: skip
        """Return the `k` best passages for each vector."""
        assert among is None
        faiss = require("faiss", extra="rag")
        probes = np.stack([self.rank(vector, nprobe) for vector in vectors]).astype(np.int64)
        self._index.nprobe = probes.shape[1]
        self._index.invlists.prefetch_lists(faiss.swig_ptr(probes), probes.size)
        # A few more than k, so that ties at the k-th place are in our order.
        found = self._index.search_preassigned(np.stack(vectors), k + 8, probes, None)
        hits = []
        for scores, ids in zip(*found[:2], strict=True):
            order = [i for i in np.lexsort((ids, -scores)) if ids[i] >= 0][:k]
            hits.append([Hit(self.passage(int(ids[i])), float(scores[i])) for i in order])
        return hits, Searched((Found(np.empty(0, np.float32), np.empty(0, np.int64)),), 0, 0)

    def passage(self, passage_id: int, store: Store | None = None) -> Any:
        """Return the passage of an id."""
        return self._like.passage(passage_id, store)


def _copy_lists(store: Store, folder: Path) -> None:
    """Write a store's lists as FAISS keeps them on disk, each contiguous."""
    faiss = require("faiss", extra="rag")
    quantizer = store.quantizer
    if quantizer.encoding != "f32" or len(store.segments) != 1 or store.num_pending:
        raise UsageError(
            "the FAISS baseline copies an index of one segment with vectors as f32",
            remedy="compact it, or leave the arm out: --arms off,question,progressive,ram",
        )
    folder.mkdir(parents=True, exist_ok=True)
    (segment,) = store.segments
    coarse = faiss.IndexFlatIP(quantizer.dims)
    coarse.add(quantizer.centroids_LD)
    index = faiss.IndexIVFFlat(
        coarse, quantizer.dims, quantizer.num_lists, faiss.METRIC_INNER_PRODUCT
    )
    index.is_trained = True
    lists = faiss.OnDiskInvertedLists(
        quantizer.num_lists, quantizer.code_bytes, str(folder / "lists.faiss")
    )
    for number in range(quantizer.num_lists):
        ids, codes = segment.read(number)
        if len(ids):
            lists.add_entries(
                number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(np.ascontiguousarray(codes))
            )
    index.ntotal = store.num_vectors
    index.replace_invlists(lists)
    faiss.write_index(index, str(folder / "index.faiss.new"))
    handle = os.open(folder / "lists.faiss", os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    (folder / "index.faiss.new").rename(folder / "index.faiss")


def find_arms(names: str) -> tuple[Arm, ...]:
    """Return the arms named in a list with commas. Raises UsageError for one that is unknown."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in ARMS:
            raise unknown_name("arm", name, ARMS)
    return tuple(cast("Arm", name) for name in chosen)


def measure(
    retrievers: dict[Arm, Retriever],
    generator: Callable[[str], Generator],
    questions: Sequence[str],
    *,
    pipeline: str,
    k: int = 4,
    nprobe: int | None = None,
    answer_tokens: int = 32,
    multiple: float = 2.0,
    warm_up: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Run]:
    """Run each question through each arm, cold, in ABBA order; return all runs.

    `generator(question)` is asked for anew in every run. The first `warm_up` questions are run and
    left out: the first measurements of pace, compilation, a server's first request. Raises
    ToolkitError when two arms find different passages for a question.
    """
    runs: list[Run] = []
    arms = list(retrievers)
    for at, question in enumerate([*questions[:warm_up], *questions]):
        of_question = []
        for arm in arms if at % 2 == 0 else arms[::-1]:
            retriever = retrievers[arm]
            _chill(arm, retriever)
            of_question.append(
                _run(arm, retriever, generator(question), question, pipeline, k, nprobe,
                     answer_tokens, multiple)
            )  # fmt: skip
        if len({run.ids for run in of_question}) > 1:
            raise ToolkitError(
                f"arms found different passages for {question!r}: "
                + "; ".join(f"{run.arm}: {run.ids}" for run in of_question),
                remedy="is the model's text the same every time (greedy, one request at a time)?",
            )
        if at >= warm_up:
            runs += of_question
            progress(at - warm_up + 1)
    return runs


def _chill(arm: Arm, retriever: Retriever) -> None:
    """Bring an arm to where each question begins."""
    if isinstance(retriever, FaissOnDisk):
        retriever.chill()
    elif arm == "ram":
        keys = retriever.store.keys(range(retriever.num_lists))
        if retriever.tiers.arena.used_bytes < retriever.store.num_bytes_held:
            for key in keys:
                with retriever.tiers.demand([key]) as demand:
                    for _ in demand:
                        pass
    else:
        retriever.tiers.clear()


def _run(
    arm: Arm,
    retriever: Retriever,
    generator: Generator,
    question: str,
    pipeline: str,
    k: int,
    nprobe: int | None,
    answer_tokens: int,
    multiple: float,
) -> Run:
    mode: Mode = arm if arm in ("question", "progressive") else "off"  # type: ignore[assignment]
    before = retriever.tiers.traffic().read_bytes
    session = Session(
        retriever, generator, k=k, nprobe=nprobe, lookahead=mode, multiple=multiple
    )  # fmt: skip
    with session:
        evidence = pipelines.find(pipeline).run(session, question)
        if evidence.answer is None and answer_tokens:
            session.generate(prompts.answer(question, evidence.hits), max_tokens=answer_tokens)
        total_s = session.elapsed_s()
    return Run(
        arm=arm,
        question=question,
        total_s=total_s,
        wait_s=sum(session.waits_s),
        generate_s=sum(each.seconds for each in session.rounds),
        num_pieces=sum(len(each.pieces) for each in session.rounds),
        ids=tuple(hit.passage.id for hit in evidence.hits),
        aheads=tuple(session.aheads),
        read_bytes=retriever.tiers.traffic().read_bytes - before,
    )


def summarise(runs: Sequence[Run]) -> list[Summary]:
    """Return what each arm took, in the order the arms first came."""
    return [_summary(arm, [run for run in runs if run.arm == arm]) for arm in _in_order(runs)]


def _in_order(runs: Sequence[Run]) -> Iterator[Arm]:
    yield from (arm for arm in ARMS if any(run.arm == arm for run in runs))


def _summary(arm: Arm, runs: Sequence[Run]) -> Summary:
    aheads = [ahead for run in runs for ahead in run.aheads]
    wanted = sum(ahead.wanted_bytes for ahead in aheads)
    resident = sum(ahead.resident_bytes for ahead in aheads)
    totals, waits = [run.total_s for run in runs], [run.wait_s for run in runs]
    count = max(1, len(aheads))
    return Summary(
        arm=arm,
        num_runs=len(runs),
        total_s=statistics.median(totals),
        total_p95_s=_p95(totals),
        wait_s=statistics.median(waits),
        wait_p95_s=_p95(waits),
        piece_s=statistics.median(run.generate_s / max(1, run.num_pieces) for run in runs),
        hit_rate=resident / wanted if wanted else 0.0,
        budget_bytes=sum(ahead.budget_bytes for ahead in aheads) / count,
        wasted_bytes=sum(ahead.wasted_bytes for ahead in aheads) / count,
        read_bytes=sum(run.read_bytes for run in runs) / len(runs),
    )


def ratios(runs: Sequence[Run], over: Arm, under: Arm) -> list[float]:
    """Return, per question, how many times as long `over` took as `under`.

    >>> runs = [Run(arm, "q", total_s, 1.0, 1.0, 8, (), (), 0)
    ...         for arm, total_s in (("off", 3.0), ("ram", 2.0))]
    >>> ratios(runs, "off", "ram")
    [1.5]
    """
    total = {(run.arm, run.question): run.total_s for run in runs}
    questions = dict.fromkeys(run.question for run in runs)
    return [total[over, question] / total[under, question] for question in questions]


def _p95(values: Sequence[float]) -> float:
    """Return the value that 95 % are not above.

    >>> _p95(list(range(1, 21)))
    19
    """
    ordered = sorted(values)
    return ordered[max(0, math.ceil(0.95 * len(ordered)) - 1)]
