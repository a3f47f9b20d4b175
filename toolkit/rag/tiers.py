"""Lists between disk and memory: one arena that all queries share, filled by a few readers.

    demand(keys)    a search that runs now: each list is handed over, held, as soon as it is here
    prefetch(keys)  a search that will run: lists are brought in while no demand waits

A list is held by leases (scans in progress: it cannot go), wanted by prefetches (it goes only for
a demand), or idle (it goes when the policy says so). A read in flight already has its place in the
arena, so the budget counts it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit import units
from toolkit.errors import ToolkitError, UsageError
from toolkit.log import get_logger
from toolkit.rag.arena import Arena
from toolkit.rag.claims import Demand, Prefetch
from toolkit.rag.disk import READ_BYTES, DirectFile, Read
from toolkit.rag.eviction import Hotness, Policy
from toolkit.rag.reads import Entry, Priority, ReadQueue, State
from toolkit.rag.store import Key, Store

_log = get_logger(__name__)


@dataclass(frozen=True)
class Traffic:
    """Counts since the tiers were opened (measured). `busy_s` is time with a read in flight."""

    read_bytes: int = 0
    lookahead_bytes: int = 0  # of read_bytes, those that no search waited for when it began
    num_reads: int = 0
    busy_s: float = 0.0
    evicted_bytes: int = 0
    refused_bytes: int = 0  # lookahead that found no room
    cancelled_bytes: int = 0  # dropped before their read began


class Tiers:
    """The lists of a store, as many of them in memory as a budget holds."""

    def __init__(
        self,
        store: Store,
        *,
        budget_bytes: int,
        policy: Policy | None = None,
        num_readers: int = 4,
        read: Read = DirectFile.read,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Open with a hard `budget_bytes` for lists, in flight or resident.

        `num_readers` threads read: a disk is fastest with a few reads in flight. With 0 the thread
        that waits for a list reads it, in a deterministic order; then only one thread may use this.
        Raises UsageError when the budget is smaller than the largest list.
        """
        self.arena = Arena(budget_bytes)
        self._check_room(store)
        self.store = store
        self._policy = policy or Hotness()
        self._read, self._clock = read, clock
        self._entries: dict[Key, Entry] = {}  # those queued, reading or resident
        self._queue = ReadQueue()
        self._idle_bytes = 0  # resident and without a lease
        self._counts: dict[str, Any] = dict.fromkeys(Traffic.__dataclass_fields__, 0)
        self._num_reading, self._busy_since_s = 0, 0.0
        self._closed = False
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)  # readers wait for reads, or for room
        self._arrival = threading.Condition(self._lock)  # searches wait for lists
        self._readers = [
            threading.Thread(target=self._serve, name=f"list reader {i}", daemon=True)
            for i in range(num_readers)
        ]
        for reader in self._readers:
            reader.start()

    def follow(self, store: Store) -> None:
        """Go on with a later state of the store (opened `after` this one).

        What is in memory of segments that are still there stays, so nothing is read again but what
        is new. Searches and lookaheads in progress end on the state they began with.
        """
        with self._lock:
            self._check_room(store)
            self.store = store
            serials = {info.serial for info in store.manifest.segments}
            for entry in list(self._entries.values()):
                idle = entry.state is State.RESIDENT and not entry.leases
                if idle and entry.key[0] not in serials:
                    self._evict(entry)
            self._work.notify()

    def _check_room(self, store: Store) -> None:
        largest = max((int(each.sizes.max()) for each in store.segments), default=0)
        if self.arena.budget_bytes < largest:
            raise UsageError(
                f"a budget of {units.format_bytes(self.arena.budget_bytes)} is less than the "
                f"largest list, {units.format_bytes(largest)}",
                remedy=f"give at least {units.format_bytes(largest)}, or build with more lists",
            )

    def demand(self, keys: Iterable[Key], store: Store | None = None) -> Demand:
        """Ask for lists now, of the newest state or of `store`, an earlier one.

        Iterate the result, inside its `with`, over their blocks.

        What is resident comes first, then each list as its read ends. Iterating raises the
        ToolkitError of a list that could not be read, the FormatError of one that is corrupt.
        """
        demand = Demand(self)
        with self._lock:
            self._policy.step()
            for key in sorted(set(keys)):  # in the order of their places on disk
                entry = self._entry(key, store)
                demand.num_lists += 1
                if entry.state is State.RESIDENT:
                    demand.resident_bytes += entry.num_bytes
                    self._policy.use(key, entry.num_bytes)
                    self._lease(entry, demand)
                    continue
                demand.missing_bytes += entry.num_bytes
                demand.missing.append(entry)
                entry.demands.append(demand)
                if entry.state is State.READING:
                    entry.priority = Priority.DEMAND
                elif entry.state is State.NEW or entry.priority is not Priority.DEMAND:
                    self._enqueue(entry, Priority.DEMAND, rank=0)
            self._work.notify_all()
        return demand

    def prefetch(self, keys: Sequence[Key], store: Store | None = None) -> Prefetch:
        """Ask for lists that a search will probably want, most probable first.

        Reads of several prefetches take turns, rank by rank. A list that finds no room among what
        is idle is not read.
        """
        with self._lock:
            entries = [self._entry(key, store) for key in dict.fromkeys(keys)]
            for rank, entry in enumerate(entries):
                entry.wanted += 1
                if entry.state is State.NEW:
                    self._enqueue(entry, Priority.LOOKAHEAD, rank)
            self._work.notify_all()
        return Prefetch(self, entries)

    def resident(self) -> set[Key]:
        """Return the lists that are in memory now."""
        with self._lock:
            return {key for key, e in self._entries.items() if e.state is State.RESIDENT}

    def evict(self, key: Key) -> bool:
        """Give up a list; return whether it was in memory and no scan held it."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.state is not State.RESIDENT or entry.leases:
                return False
            self._evict(entry)
            self._work.notify()
            return True

    def clear(self) -> None:
        """Give up every list that no scan holds: memory as cold as at the start."""
        for key in self.resident():
            self.evict(key)

    def traffic(self) -> Traffic:
        """Return what has been read, evicted and dropped so far."""
        with self._lock:
            counts = dict(self._counts)
            if self._num_reading:
                counts["busy_s"] += self._clock() - self._busy_since_s
            return Traffic(**counts)

    def close(self) -> None:
        """Stop the readers after the reads in flight; searches that still wait get an error."""
        with self._lock:
            self._closed = True
            for entry in list(self._entries.values()):
                if entry.demands and entry.state is State.QUEUED:
                    self._fail(entry, ToolkitError("the index was closed during a search"))
                elif entry.state is State.QUEUED:
                    self._drop(entry)
            self._work.notify_all()
        for reader in self._readers:
            reader.join()

    # For Demand and Prefetch.

    def await_one(self, demand: Demand) -> Entry:
        """Return the next list of a demand, leased to it; wait, or read, until there is one."""
        with self._lock:
            while not demand.ready:
                if demand.error:
                    raise demand.error
                if self._readers:
                    self._arrival.wait()
                elif not self.read_one():
                    raise ToolkitError(
                        f"no room in {units.format_bytes(self.arena.budget_bytes)}: all of it is "
                        "held by scans in progress",
                        remedy="give more memory, or finish those scans first",
                    )
            return demand.ready.popleft()

    def release(self, entry: Entry) -> None:
        """End one lease of a list."""
        with self._lock:
            entry.leases -= 1
            if not entry.leases:
                self._idle_bytes += entry.num_bytes
                if self._queue:
                    self._work.notify()  # a read may have been waiting for this room

    def cancel(self, demand: Demand) -> None:
        """End a demand: nothing is leased to it any more, nothing is read for it alone."""
        with self._lock:
            while demand.ready:
                self.release(demand.ready.popleft())
            for entry in demand.missing:
                if demand in entry.demands:
                    entry.demands.remove(demand)
                    self._reconsider(entry)

    def abandon(self, entries: Iterable[Entry]) -> None:
        """End a prefetch of these lists."""
        with self._lock:
            for entry in entries:
                entry.wanted -= 1
                self._reconsider(entry)

    def read_one(self) -> bool:
        """Do the next read on this thread; return whether there was one, and room for it."""
        with self._lock:
            batch = self._take()
        if batch:
            self._carry_out(batch)
        return bool(batch)

    # Readers. `_take` and what it calls hold the lock; the others take it for a moment.

    def _serve(self) -> None:
        while True:
            with self._lock:
                while not (batch := self._take()):
                    if self._closed:
                        return
                    self._work.wait()
                if self._queue:
                    self._work.notify()  # there may be room for one more
            self._carry_out(batch)

    def _take(self) -> list[Entry]:
        """Return the lists of the next read, each with its place; none when there is no room."""
        while (entry := self._queue.first()) is not None:
            if self._place(entry):
                break
            if entry.priority is Priority.DEMAND:
                return []  # nobody overtakes it: room comes when a lease ends
            self._counts["refused_bytes"] += entry.num_bytes
            self._drop(entry)
        else:
            return []
        batch, size = [entry], entry.num_bytes
        while (near := self._queue.neighbour(batch[-1])) and size + near.num_bytes <= READ_BYTES:
            if not self._place(near):
                break
            batch.append(near)
            size += near.num_bytes
        return batch

    def _place(self, entry: Entry) -> bool:
        """Give a queued list its place, evicting what may go for it; then it is being read."""
        place = self.arena.take(entry.num_bytes)
        if place is None and self.arena.free_bytes + self._idle_bytes >= entry.num_bytes:
            place = self._make_room(entry.num_bytes, wanted_too=False)
            if place is None and entry.priority is Priority.DEMAND:
                place = self._make_room(entry.num_bytes, wanted_too=True)
        if place is None:
            return False
        entry.place, entry.state = place, State.READING
        self._queue.remove(entry)
        return True

    def _make_room(self, num_bytes: int, *, wanted_too: bool) -> int | None:
        with contextlib.closing(self._policy.coldest()) as coldest:
            for key in coldest:
                victim = self._entries[key]
                if victim.leases or (victim.wanted and not wanted_too):
                    continue
                self._evict(victim)
                place = self.arena.take(num_bytes)
                if place is not None:
                    return place
        return None

    def _carry_out(self, batch: list[Entry]) -> None:
        """Read and check lists that have their places."""
        size = sum(entry.num_bytes for entry in batch)
        with self._lock:
            if not self._num_reading:
                self._busy_since_s = self._clock()
            self._num_reading += 1
            self._counts["num_reads"] += 1
            if batch[0].priority is Priority.LOOKAHEAD:
                self._counts["lookahead_bytes"] += size
        errors = [self._fetch(batch)] * len(batch)
        if errors[0] and len(batch) > 1:  # one bad list must not take its neighbours along
            errors = [self._fetch([entry]) for entry in batch]
        with self._lock:
            self._num_reading -= 1
            if not self._num_reading:
                self._counts["busy_s"] += self._clock() - self._busy_since_s
            self._counts["read_bytes"] += size
            for entry, error in zip(batch, errors, strict=True):
                if error:
                    self._fail(entry, error)
                else:
                    self._land(entry)
            self._arrival.notify_all()
            self._work.notify_all()

    def _fetch(self, batch: list[Entry]) -> Exception | None:
        """Read neighbouring lists into their places; return what went wrong."""
        segment = batch[0].segment
        try:
            blocks = [self.arena.view(each.place or 0, each.num_bytes) for each in batch]
            self._read(segment.file, batch[0].offset, [block.data for block in blocks])
            for entry, block in zip(batch, blocks, strict=True):
                segment.check(entry.key[1], block)
        except Exception as error:  # the reader lives on; the search is told
            return error
        return None

    # An entry from one state to the next, under the lock.

    def _entry(self, key: Key, store: Store | None) -> Entry:
        if self._closed:
            raise ToolkitError("the index is closed")
        return self._entries.get(key) or Entry(store or self.store, key)

    def _enqueue(self, entry: Entry, priority: Priority, rank: int) -> None:
        self._entries[entry.key] = entry
        self._queue.push(entry, priority, rank)

    def _land(self, entry: Entry) -> None:
        entry.state = State.RESIDENT
        self._idle_bytes += entry.num_bytes
        self._policy.use(entry.key, entry.num_bytes)
        for demand in entry.demands:
            self._lease(entry, demand)
        entry.demands.clear()

    def _lease(self, entry: Entry, demand: Demand) -> None:
        if not entry.leases:
            self._idle_bytes -= entry.num_bytes
        entry.leases += 1
        demand.ready.append(entry)

    def _fail(self, entry: Entry, error: Exception) -> None:
        for demand in entry.demands:
            demand.error = error
        if not entry.demands:  # the search will ask again, and be told if it fails again
            _log.warning("lookahead: %s", error)
        self._drop(entry)
        self._arrival.notify_all()

    def _evict(self, entry: Entry) -> None:
        self._counts["evicted_bytes"] += entry.num_bytes
        self._idle_bytes -= entry.num_bytes
        self._policy.evicted(entry.key)
        self._drop(entry)

    def _reconsider(self, entry: Entry) -> None:
        """Demote or drop a list that waits to be read and that no search waits for any more."""
        if entry.state is not State.QUEUED or entry.demands:
            return
        if not entry.wanted:
            self._counts["cancelled_bytes"] += entry.num_bytes
            self._drop(entry)
        elif entry.priority is Priority.DEMAND:
            self._queue.push(entry, Priority.LOOKAHEAD, rank=0)
        self._work.notify()  # it may have been the one that all others waited behind

    def _drop(self, entry: Entry) -> None:
        self._queue.remove(entry)
        del self._entries[entry.key]
        if entry.place is not None:
            self.arena.give_back(entry.place)
        entry.state = State.GONE
