"""Searches of several questions at once: those that share lists go together, none waits too long.

A list that a group probes is read once and scanned for all of it while it is in memory, so with
little memory a good order of questions saves reads. Grouping by shared lists: TeleRAG's prefetching
scheduler (arXiv 2502.20969) and CaGR-RAG (2505.01164); weighing them by bytes, and the bound on
age, are ours.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from toolkit.errors import ToolkitError
from toolkit.rag.retriever import Hit, Retriever
from toolkit.rag.search import Searched


@dataclass(eq=False)  # one of two equal searches is not the other
class _Waiting:
    vectors: Sequence[np.ndarray]
    k: int
    nprobe: int | None
    among: Any
    lists: frozenset[int]
    since_s: float
    done: Future[tuple[list[list[Hit]], Searched]] = field(default_factory=Future)

    @property
    def how(self) -> tuple[int, int | None, Any]:
        """What searches in one call must have in common."""
        return self.k, self.nprobe, self.among


class Grouping(Retriever):
    """A retriever for many threads, whose searches are put into groups by one dispatcher."""

    def __init__(
        self,
        retriever: Retriever,
        *,
        most: int = 8,
        wait_s: float = 0.01,
        age_s: float = 0.25,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Groups of up to `most` searches.

        The first of a group waits at most `wait_s` for others to come. A search that is older than
        `age_s` leads the next group, whatever others would share.
        """
        super().__init__(retriever.store, retriever.encoder, retriever.tiers)
        self.pace = retriever.pace
        self._inner = retriever
        self._most, self._wait_s, self._age_s, self._clock = most, wait_s, age_s, clock
        self._queue: list[_Waiting] = []
        self._came = threading.Condition()
        self._closed = False
        self.num_groups = self.num_searches = 0
        self._hot: frozenset[int] = frozenset()  # what the last group probed
        self._thread = threading.Thread(target=self._dispatch, name="grouping", daemon=True)
        self._thread.start()

    def retrieve_many(
        self, vectors: Sequence[np.ndarray], k: int = 5, nprobe: int | None = None,
        *, among: Any = None,
    ) -> tuple[list[list[Hit]], Searched]:  # fmt: skip
        """Return the `k` best passages for each vector; waits for its turn.

        Raises ToolkitError once it is closed.
        """
        probes = [self.rank(vector, nprobe) for vector in vectors]
        lists = frozenset(int(number) for number in np.unique(np.concatenate(probes)))
        waiting = _Waiting(vectors, k, nprobe, among, lists, self._clock())
        with self._came:
            if self._closed:
                raise ToolkitError("the index is closed")
            self._queue.append(waiting)
            self._came.notify()
        return waiting.done.result()

    def refresh(self) -> bool:
        """Go on with the index's newest state, keeping what is in memory."""
        changed = self._inner.refresh()
        self.store = self._inner.store
        return changed

    def close(self) -> None:
        """Finish the searches that wait, then close the index."""
        with self._came:
            self._closed = True
            self._came.notify()
        self._thread.join()
        self._inner.close()

    def _dispatch(self) -> None:
        while True:
            with self._came:
                while not self._queue and not self._closed:
                    self._came.wait()
                if not self._queue:
                    return
                until_s = self._queue[0].since_s + self._wait_s
                while len(self._queue) < self._most and not self._closed:
                    left_s = until_s - self._clock()
                    if left_s <= 0 or not self._came.wait(left_s):
                        break
                group = choose(
                    self._queue, self._most, hot=self._hot, old_s=self._clock() - self._age_s,
                    sizes=self.store.list_nums(),
                )  # fmt: skip
                self._queue = [each for each in self._queue if each not in group]
            self._hot = frozenset().union(*(each.lists for each in group))
            self._run(group)

    def _run(self, group: list[_Waiting]) -> None:
        first = group[0]
        alike = [each for each in group if each.how == first.how]
        self.num_groups += 1
        self.num_searches += len(alike)
        try:
            vectors = [vector for each in alike for vector in each.vectors]
            hits, where = self._inner.retrieve_many(
                vectors, first.k, first.nprobe, among=first.among
            )
        except Exception as error:  # whoever asked is told; the dispatcher lives on
            for each in alike:
                each.done.set_exception(error)
        else:
            at = 0
            for each in alike:
                each.done.set_result((hits[at : at + len(each.vectors)], where))
                at += len(each.vectors)
        others = [each for each in group if each not in alike]
        if others:
            self._run(others)


def choose(
    waiting: Sequence[Any], most: int, *, hot: frozenset[int], old_s: float, sizes: np.ndarray
) -> list[Any]:
    """Return the next group of the waiting searches, which came in this order.

    It begins with the first one that came before `old_s`, or else with the one that shares most
    with `hot`, the lists probed last; then it takes, each time, the search that shares most with
    the group. Shares are bytes in common over bytes of the search itself.
    """

    def share(each: Any, lists: frozenset[int]) -> float:
        own = sum(int(sizes[number]) for number in each.lists)
        return sum(int(sizes[number]) for number in each.lists & lists) / max(1, own)

    left = list(waiting)
    old = [each for each in left if each.since_s <= old_s]
    first = old[0] if old else max(left, key=lambda each: share(each, hot))
    group, lists = [first], first.lists
    left.remove(first)
    while left and len(group) < most:
        best = max(left, key=lambda each: share(each, lists))
        left.remove(best)
        group.append(best)
        lists |= best.lists
    return group
