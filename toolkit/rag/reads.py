"""Lists that wait to be read: who goes first, and which go together."""

from __future__ import annotations

import enum
import heapq
import itertools
from typing import TYPE_CHECKING

from toolkit.rag.store import Key, Store

if TYPE_CHECKING:
    from toolkit.rag.claims import Demand


class Priority(enum.IntEnum):
    """Which reads go first."""

    DEMAND = 0
    LOOKAHEAD = 1


class State(enum.Enum):
    """Where a list stands."""

    NEW = "new"
    QUEUED = "queued"
    READING = "reading"
    RESIDENT = "resident"
    GONE = "gone"


class Entry:
    """What the tiers know of one list; they own it and change it under their lock."""

    __slots__ = ("demands", "key", "leases", "num_bytes", "offset", "place", "priority", "segment",
                 "state", "wanted")  # fmt: skip

    def __init__(self, store: Store, key: Key) -> None:
        self.segment = store.segment(key)
        self.key = key
        self.num_bytes = int(self.segment.sizes[key[1]])
        self.offset = int(self.segment.offsets[key[1]])  # in the segment's file
        self.place: int | None = None  # in the arena
        self.priority = Priority.LOOKAHEAD
        self.state = State.NEW
        self.leases = 0  # scans in progress: it cannot go
        self.wanted = 0  # prefetches: it goes for a demand only
        self.demands: list[Demand] = []  # searches that wait for it


class ReadQueue:
    """Entries in the state QUEUED, by priority, then rank, then arrival."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int, Entry]] = []  # some of it outdated
        self._at: dict[tuple[int, int], Entry] = {}  # (segment, offset) -> entry
        self._count = itertools.count()

    def __bool__(self) -> bool:
        return bool(self._at)

    def push(self, entry: Entry, priority: Priority, rank: int) -> None:
        """Queue an entry, or queue it anew with a higher priority."""
        entry.state, entry.priority = State.QUEUED, priority
        self._at[entry.key[0], entry.offset] = entry
        heapq.heappush(self._heap, (priority, rank, next(self._count), entry))

    def remove(self, entry: Entry) -> None:
        """Take out an entry, wherever it stands."""
        self._at.pop((entry.key[0], entry.offset), None)

    def first(self) -> Entry | None:
        """Return the entry whose turn it is."""
        while self._heap:
            priority, _, _, entry = self._heap[0]
            here = self._at.get((entry.key[0], entry.offset)) is entry
            if here and entry.priority == priority:
                return entry
            heapq.heappop(self._heap)
        return None

    def neighbour(self, entry: Entry) -> Entry | None:
        """Return the entry that follows on disk, if it is queued with the same priority."""
        found = self._at.get((entry.key[0], entry.offset + entry.num_bytes))
        return found if found and found.priority == entry.priority else None
