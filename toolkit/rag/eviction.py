"""Which list to give up when memory is full: three policies, told of every use.

A policy gives each list a heat, and the coldest goes first. All three can be written so that the
heat of a list changes only when the list is used, which is what makes a heap of them cheap.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Generator

from toolkit.errors import unknown_name
from toolkit.rag.store import Key


class Policy(ABC):
    """Lists by heat. One owner, which calls it under its own lock."""

    def __init__(self) -> None:
        self._heat: dict[Key, float] = {}
        self._heap: list[tuple[float, Key]] = []  # with entries whose heat is no longer theirs

    def use(self, key: Key, num_bytes: int) -> None:
        """Take note that a list was brought in, or was wanted and there."""
        heat = self._hotter(key, num_bytes)
        self._heat[key] = heat
        heapq.heappush(self._heap, (heat, key))
        if len(self._heap) > 64 + 4 * len(self._heat):
            self._heap = [(heat, key) for key, heat in self._heat.items()]
            heapq.heapify(self._heap)

    def step(self) -> None:
        """Take note that a search begins; most policies count uses only."""
        return

    def evicted(self, key: Key) -> None:
        """Forget a list that went away."""
        del self._heat[key]

    def coldest(self) -> Generator[Key, None, None]:
        """Yield lists, coldest first; the caller may evict each one it is given."""
        passed = []
        try:
            while self._heap:
                heat, key = heapq.heappop(self._heap)
                if self._heat.get(key) == heat:
                    passed.append((heat, key))
                    yield key
        finally:
            for heat, key in passed:
                if self._heat.get(key) == heat:
                    heapq.heappush(self._heap, (heat, key))

    @abstractmethod
    def _hotter(self, key: Key, num_bytes: int) -> float:
        """Return the heat of a list that is used now."""


class Hotness(Policy):
    """TeleRAG's: 1024 for a use, halved with every search (arXiv 2502.20969).

    What halves together keeps its order, so the heat kept is log2(hotness) + searches so far. It
    differs from the published rule in that a hotness below 1 is not rounded to 0.

    >>> policy = Hotness()
    >>> for used in ("a", "a", "b"):
    ...     policy.use((0, ord(used)), 1)
    ...     policy.step()
    >>> [chr(number) for _, number in policy.coldest()]  # 1024/8 + 1024/4 for a, 1024/2 for b
    ['a', 'b']
    """

    _USE = 1024.0

    def __init__(self) -> None:
        super().__init__()
        self._num_steps = 0

    def step(self) -> None:
        self._num_steps += 1

    def _hotter(self, key: Key, num_bytes: int) -> float:
        old = self._heat.get(key)
        left = 2.0 ** (old - self._num_steps) if old is not None else 0.0
        return math.log2(left + self._USE) + self._num_steps


class Lru(Policy):
    """The least recently used goes first."""

    def __init__(self) -> None:
        super().__init__()
        self._num_uses = 0

    def _hotter(self, key: Key, num_bytes: int) -> float:
        self._num_uses += 1
        return float(self._num_uses)


class Gdsf(Policy):
    """Greedy dual, size and frequency: uses times the cost of reading again, by the bytes held.

    Cherkasova 1998, HPL-98-69R1. A read costs a latency and its bytes at the disk's bandwidth, so
    small lists are a little dearer by the byte. The clock, the heat of what went last, is added,
    so that what was hot long ago cools.
    """

    def __init__(self, *, latency_s: float = 1e-4, bytes_per_s: float = 8e8) -> None:
        super().__init__()
        self._latency_s, self._bytes_per_s = latency_s, bytes_per_s
        self._clock = 0.0
        self._num_uses: dict[Key, int] = {}

    def evicted(self, key: Key) -> None:
        self._clock = max(self._clock, self._heat[key])
        self._num_uses.pop(key)
        super().evicted(key)

    def _hotter(self, key: Key, num_bytes: int) -> float:
        uses = self._num_uses[key] = self._num_uses.get(key, 0) + 1
        cost_s = self._latency_s + num_bytes / self._bytes_per_s
        return self._clock + uses * cost_s / (num_bytes / self._bytes_per_s)


POLICIES: dict[str, type[Policy]] = {"hotness": Hotness, "lru": Lru, "gdsf": Gdsf}


def policy(name: str) -> Policy:
    """Return a new policy by its name. Raises UsageError for one that is not known.

    >>> type(policy("lru")).__name__
    'Lru'
    """
    if name not in POLICIES:
        raise unknown_name("eviction policy", name, POLICIES)
    return POLICIES[name]()
