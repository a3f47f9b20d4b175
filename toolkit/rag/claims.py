"""What a search holds of the tiers: the lists it scans now, and those it will want."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from toolkit.rag.reads import Entry, State
from toolkit.rag.store import Key

if TYPE_CHECKING:
    from toolkit.rag.tiers import Tiers


class Block(NamedTuple):
    """A list in memory: views into the arena, valid until the next block is asked for."""

    key: Key
    ids: np.ndarray  # int64 [n]
    codes: np.ndarray  # uint8 [n, C]


class Demand:
    """Lists on their way to one search. Use inside `with`, which gives back what is held."""

    def __init__(self, tiers: Tiers) -> None:
        """Made by `Tiers.demand`."""
        self.resident_bytes = 0  # in memory when they were asked for
        self.missing_bytes = 0  # not, or not yet
        self.num_lists = 0
        self.ready: deque[Entry] = deque()  # each with a lease for us
        self.missing: list[Entry] = []
        self.error: Exception | None = None
        self._tiers = tiers
        self._held: Entry | None = None

    def __enter__(self) -> Demand:
        return self

    def __iter__(self) -> Iterator[Block]:
        """Yield each list once; a block is valid until the next one is asked for."""
        for _ in range(self.num_lists):
            self._give_back()
            entry = self._held = self._tiers.await_one(self)
            data = self._tiers.arena.view(entry.place or 0, entry.num_bytes)
            yield Block(entry.key, *entry.segment.split(entry.key[1], data))
        self._give_back()

    def _give_back(self) -> None:
        if self._held is not None:
            self._tiers.release(self._held)
            self._held = None

    def __exit__(self, *_: object) -> None:
        self._give_back()
        self._tiers.cancel(self)


class Prefetch:
    """Lists that a search will probably want. `close` it when that search is done, or never was."""

    def __init__(self, tiers: Tiers, entries: list[Entry]) -> None:
        """Made by `Tiers.prefetch`."""
        self._tiers = tiers
        self._entries = entries

    def unread(self) -> set[Key]:
        """Return its lists whose read has not begun, or never will: queued, refused, dropped."""
        return {e.key for e in self._entries if e.place is None}

    @property
    def landed_bytes(self) -> int:
        """The bytes of its lists that are in memory now."""
        return sum(e.num_bytes for e in self._entries if e.state is State.RESIDENT)

    @property
    def waiting_bytes(self) -> int:
        """The bytes of its lists whose read has not ended."""
        waiting = (State.QUEUED, State.READING)
        return sum(e.num_bytes for e in self._entries if e.state in waiting)

    def keep(self, wanted: Callable[[Key], bool]) -> None:
        """Go on wanting only some of the lists; queued reads of the others are dropped."""
        kept: list[Entry] = []
        others: list[Entry] = []
        for entry in self._entries:
            (kept if wanted(entry.key) else others).append(entry)
        self._entries = kept
        self._tiers.abandon(others)

    def drop_unread(self) -> set[Key]:
        """Go on wanting what is read or being read; return the others, which no longer wait."""
        unread = self.unread()
        self.keep(lambda key: key not in unread)
        return unread

    def close(self) -> None:
        """Want the lists no more: queued reads are dropped, what is in flight lands in memory."""
        self.keep(lambda key: False)
