"""Memory stays inside its budget; demand goes first; what is held stays; what fails is named."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import FormatError, ToolkitError, UsageError
from toolkit.rag.arena import Arena
from toolkit.rag.disk import DirectFile
from toolkit.rag.eviction import Gdsf, Hotness, Lru, Policy, policy
from toolkit.rag.store import Key, Store
from toolkit.rag.tiers import Tiers

PAGE = 4096


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9 * PAGE)), max_size=80))
def test_places_never_overlap_and_all_room_comes_back(steps: list[tuple[bool, int]]) -> None:
    arena = Arena(40 * PAGE)
    taken: dict[int, int] = {}
    for take, size in steps:
        pages = -(-size // PAGE)
        if take or not taken:
            free = np.ones(40, bool)
            for offset, num in taken.items():
                free[offset // PAGE : offset // PAGE + num] = False
            runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], free, [0]]))))[::2]
            offset = arena.take(size)
            assert (offset is None) == (not len(runs) or runs.max() < pages)
            if offset is not None:
                place = slice(offset // PAGE, offset // PAGE + pages)
                assert free[place].all()
                assert offset + pages * PAGE <= arena.budget_bytes
                taken[offset] = pages
        else:
            offset = sorted(taken)[size % len(taken)]
            del taken[offset]
            arena.give_back(offset)
        assert arena.used_bytes == sum(taken.values()) * PAGE
    for offset in taken:
        arena.give_back(offset)
    assert arena.take(40 * PAGE) == 0


def test_a_budget_that_holds_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="holds no page of 4 KiB; give more memory"):
        Arena(PAGE - 1)
    view = Arena(3 * PAGE).view(PAGE, 10)
    assert view.ctypes.data % PAGE == 0
    view[:] = 7


def _order(policy: Policy, searches: str, sizes: dict[str, int] | None = None) -> str:
    """Use the lists of each search, a word of letters; return the letters, coldest first."""
    for lists in searches.split():
        for letter in lists:
            policy.use((0, ord(letter)), (sizes or {}).get(letter, PAGE))
        policy.step()
    return "".join(chr(number) for _, number in policy.coldest())


def test_policies_order_lists_as_their_sources_say() -> None:
    assert _order(Lru(), "a b c a b") == "cab"
    assert _order(Hotness(), "a a a b") == "ab"
    assert _order(Hotness(), "a ba") == "ba"  # both in the last search, a before as well
    assert _order(Gdsf(), "a a b") == "ba"
    large = {"a": 100 * PAGE}
    assert _order(Gdsf(), "a b", large) == "ab"  # by the byte, a small list is dearer to read
    with pytest.raises(UsageError, match="did you mean 'lru'"):
        policy("lur")


@given(st.lists(st.sets(st.sampled_from("abcdef"), min_size=1), max_size=40))
def test_hotness_is_the_published_rule(searches: list[set[str]]) -> None:
    hotness: dict[str, float] = {}
    for lists in searches:
        for letter in lists:
            hotness[letter] = hotness.get(letter, 0) + 1024
        hotness = {key: value / 2 for key, value in hotness.items()}
    order = _order(Hotness(), " ".join("".join(sorted(lists)) for lists in searches))
    heats = [hotness[letter] for letter in order]
    assert heats == pytest.approx(sorted(heats), rel=1e-9)
    assert set(order) == set(hotness)


def test_gdsf_forgets_what_was_hot_long_ago() -> None:
    gdsf = Gdsf()
    assert _order(gdsf, "a a a a a b") == "ba"
    for number in range(20):  # each comes, and the coldest goes
        gdsf.use((0, number), PAGE)
        coldest = gdsf.coldest()
        gdsf.evicted(next(coldest))
        coldest.close()
    assert (0, ord("a")) not in set(gdsf.coldest())


@pytest.fixture
def store(
    make_store: Callable[..., Path], cloud: Callable[..., np.ndarray], tmp_path: Path
) -> Iterator[Store]:
    """16 lists, each some pages."""
    path = make_store(tmp_path / "store", cloud(3000), num_lists=16)
    with contextlib.closing(Store.open(path)) as opened:
        yield opened


def _total(store: Store) -> int:
    return int(sum(segment.sizes.sum() for segment in store.segments))


def _take(tiers: Tiers, keys: list[Key]) -> list[int]:
    """Demand lists and go through them; return their numbers."""
    with tiers.demand(keys) as demand:
        return sorted(block.key[1] for block in demand)


def _drain(tiers: Tiers) -> None:
    while tiers.read_one():
        pass


class _Log:
    """A disk that notes the lists it reads, in order, and can be held up."""

    def __init__(self, store: Store) -> None:
        self.reads: list[list[int]] = []
        self.go = threading.Event()
        self.go.set()
        self._at = {int(offset): i for i, offset in enumerate(store.segments[0].offsets)}

    def __call__(self, file: DirectFile, offset: int, buffers: Sequence[memoryview]) -> None:
        first = self._at[offset]
        self.reads.append(list(range(first, first + len(buffers))))
        assert self.go.wait(30)
        file.read(offset, buffers)


def test_demand_overtakes_lookahead_and_neighbours_are_read_together(store: Store) -> None:
    disk = _Log(store)
    tiers = Tiers(store, budget_bytes=_total(store), num_readers=0, read=disk)
    tiers.prefetch(store.keys([9, 3, 5, 4]))
    with tiers.demand(store.keys([12, 0, 13, 1, 2])) as demand:
        assert sorted(block.key[1] for block in demand) == [0, 1, 2, 12, 13]
    _drain(tiers)
    assert disk.reads == [[0, 1, 2], [12, 13], [9], [3, 4, 5]]
    traffic = tiers.traffic()
    assert (traffic.num_reads, traffic.refused_bytes, traffic.cancelled_bytes) == (4, 0, 0)
    ahead = sum(map(store.num_bytes, store.keys([9, 3, 4, 5])))
    assert traffic.lookahead_bytes == ahead


def test_prefetches_take_turns_by_rank(store: Store) -> None:
    disk = _Log(store)
    tiers = Tiers(store, budget_bytes=_total(store), num_readers=0, read=disk)
    tiers.prefetch(store.keys([0, 2, 4]))
    tiers.prefetch(store.keys([10, 12, 14]))
    _drain(tiers)
    assert disk.reads == [[0], [10], [2], [12], [4], [14]]


def test_a_demand_for_what_lookahead_queued_raises_its_priority(store: Store) -> None:
    disk = _Log(store)
    tiers = Tiers(store, budget_bytes=_total(store), num_readers=0, read=disk)
    ahead = tiers.prefetch(store.keys([0, 2, 4, 6]))
    with tiers.demand(store.keys([6])) as demand:
        assert [block.key[1] for block in demand] == [6]
    assert disk.reads == [[6]]
    assert ahead.waiting_bytes == sum(map(store.num_bytes, store.keys([0, 2, 4])))
    ahead.close()
    assert not tiers.read_one()
    assert tiers.traffic().cancelled_bytes == sum(map(store.num_bytes, store.keys([0, 2, 4])))


def test_what_lookahead_brought_stays_for_its_search_and_yields_to_demand(store: Store) -> None:
    keys = store.keys(range(16))
    room = sum(map(store.num_bytes, keys[:6]))
    tiers = Tiers(store, budget_bytes=room, num_readers=0, policy=Lru())
    ahead = tiers.prefetch(keys[:6])
    _drain(tiers)
    assert ahead.landed_bytes == room
    greedy = tiers.prefetch(keys[6:])
    _drain(tiers)
    assert tiers.resident() == set(keys[:6])  # no room for the second one, so nothing was read
    assert tiers.traffic().refused_bytes == sum(map(store.num_bytes, keys[6:]))
    greedy.close()
    with tiers.demand(keys[10:12]) as demand:
        assert len(list(demand)) == 2
    assert set(keys[10:12]) <= tiers.resident()
    ahead.close()
    tiers.prefetch(keys[12:14])
    _drain(tiers)
    assert set(keys[12:14]) <= tiers.resident()  # what nobody wants any more makes room


def test_a_lease_stops_eviction(store: Store) -> None:
    keys = store.keys(range(16))
    room = sum(map(store.num_bytes, keys[:3]))
    tiers = Tiers(store, budget_bytes=room, num_readers=0)
    with tiers.demand(keys[:3]) as held:
        blocks = iter(held)
        block = next(blocks)
        before = block.codes.tobytes()
        assert not tiers.evict(block.key)
        tiers.clear()
        assert tiers.resident() == set(keys[:3])
        with pytest.raises(ToolkitError, match="all of it is held by scans in progress"):
            _take(tiers, keys[3:])
        assert block.codes.tobytes() == before
        assert len(list(blocks)) == 2
    tiers.clear()
    assert tiers.arena.used_bytes == 0


def test_a_cancelled_search_gives_everything_back(store: Store) -> None:
    keys = store.keys(range(16))
    tiers = Tiers(store, budget_bytes=_total(store), num_readers=0)
    with tiers.demand(keys[:4]) as demand:
        list(demand)
    with tiers.demand(keys) as demand:
        blocks = iter(demand)
        for _ in range(4):
            next(blocks)
    assert tiers.resident() == set(keys[:4])
    assert not tiers.read_one()
    tiers.clear()
    assert tiers.arena.used_bytes == 0


def test_a_cancelled_search_leaves_lookahead_its_turn(store: Store) -> None:
    disk = _Log(store)
    tiers = Tiers(store, budget_bytes=_total(store), num_readers=0, read=disk)
    ahead = tiers.prefetch(store.keys([0, 4]))
    with tiers.demand(store.keys([4, 8])):
        pass
    with tiers.demand(store.keys([12])) as demand:
        list(demand)
    _drain(tiers)
    assert disk.reads[0] == [12]
    assert sorted(disk.reads[1:]) == [[0], [4]]
    ahead.close()


def test_in_flight_reads_of_a_closed_prefetch_land(store: Store) -> None:
    disk = _Log(store)
    disk.go.clear()
    tiers = Tiers(store, budget_bytes=_total(store), num_readers=1, read=disk)
    ahead = tiers.prefetch(store.keys([0, 8, 4]))
    while not disk.reads:
        threading.Event().wait(0.001)
    ahead.close()
    assert tiers.arena.used_bytes == store.num_bytes(
        store.keys([0])[0]
    )  # it is counted while in flight
    disk.go.set()
    with tiers.demand(store.keys([0])) as demand:
        assert len(list(demand)) == 1
    assert disk.reads == [[0]]
    tiers.close()


def test_a_budget_below_the_largest_list_is_refused(store: Store) -> None:
    with pytest.raises(UsageError, match=r"a budget of 8 KiB is less than the largest list"):
        Tiers(store, budget_bytes=8192)


def test_a_corrupt_list_is_named_and_its_neighbours_are_served(store: Store) -> None:
    segment = store.segments[0]
    handle = os.open(segment.path, os.O_WRONLY)
    os.pwrite(handle, b"\xff\xfe", int(segment.offsets[7]) + 100)
    os.close(handle)
    tiers = Tiers(store, budget_bytes=_total(store), num_readers=0)
    ahead = tiers.prefetch(store.keys(range(5, 10)))
    _drain(tiers)  # one read of five lists
    assert {number for _, number in tiers.resident()} == {5, 6, 8, 9}
    ahead.close()
    for _ in range(2):
        with pytest.raises(FormatError, match=r"lists\.bin is corrupt in list 7 \(bytes \d+ to"):
            _take(tiers, store.keys([6, 7, 8]))
    tiers.clear()
    assert tiers.arena.used_bytes == 0


def test_a_disk_that_fails_is_told_to_every_search_and_heals(store: Store) -> None:
    broken = threading.Event()
    broken.set()

    def read(file: DirectFile, offset: int, buffers: Sequence[memoryview]) -> None:
        if broken.is_set():
            raise ToolkitError(f"cannot read {file.path} at byte {offset}: Input/output error")
        file.read(offset, buffers)

    tiers = Tiers(store, budget_bytes=_total(store), num_readers=2, read=read)
    for _ in range(2):
        with pytest.raises(ToolkitError, match=r"lists\.bin at byte \d+: Input/output error"):
            _take(tiers, store.keys([1, 9]))
    broken.clear()
    assert _take(tiers, store.keys([1, 9])) == [1, 9]
    tiers.close()


def test_closing_ends_searches_that_wait(store: Store) -> None:
    disk = _Log(store)
    disk.go.clear()
    tiers = Tiers(store, budget_bytes=_total(store), num_readers=1, read=disk)
    said: list[str] = []

    def ask() -> None:
        try:
            with tiers.demand(store.keys([0, 8])) as demand:
                list(demand)
        except ToolkitError as error:
            said.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    while not disk.reads:
        threading.Event().wait(0.001)
    closing = threading.Thread(target=tiers.close)
    closing.start()
    while not tiers._closed:
        threading.Event().wait(0.001)
    disk.go.set()
    thread.join(30)
    closing.join(30)
    assert said == ["the index was closed during a search"]
    with pytest.raises(ToolkitError, match="closed"):
        tiers.demand(store.keys([0]))


_BUDGET = """
import sys
from pathlib import Path
import numpy as np
from toolkit.rag.search import search
from toolkit.rag.store import Key, Store
from toolkit.rag.tiers import Tiers

def peak_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024

store = Store.open(sys.argv[1])
tiers = Tiers(store, budget_bytes=int(sys.argv[2]))
queries = np.random.default_rng(0).normal(size=(24, store.quantizer.dims)).astype(np.float32)
probes = [store.quantizer.rank(query, store.quantizer.num_lists) for query in queries]
search(tiers, queries[:1], [probes[0][:1]], 5)
before = peak_bytes()
ahead = tiers.prefetch(store.keys(probes[0]))
for query, lists in zip(queries, probes):
    search(tiers, query[None], [lists], 5)
tiers.close()
print(peak_bytes() - before, tiers.traffic().read_bytes)
"""


def test_memory_stays_inside_the_budget(
    make_store: Callable[..., Path], cloud: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    """By the kernel's own count: peak resident memory of a process that searches everything."""
    path = make_store(tmp_path / "store", cloud(24_000, 256), num_lists=64)
    index_bytes = (path / "s-000002" / "lists.bin").stat().st_size
    assert index_bytes > 23 << 20

    def grown(budget_bytes: int) -> tuple[int, int]:
        done = subprocess.run(
            [sys.executable, "-c", _BUDGET, str(path), str(budget_bytes)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        peak_bytes, read_bytes = map(int, done.stdout.split())
        return peak_bytes, read_bytes

    slack_bytes = 2 << 20  # threads' stacks, Python's objects
    peak_bytes, read_bytes = grown(4 << 20)
    assert peak_bytes < (4 << 20) + slack_bytes
    assert read_bytes > 10 * index_bytes
    peak_bytes, read_bytes = grown(32 << 20)
    assert index_bytes - (4 << 20) < peak_bytes < (32 << 20) + slack_bytes
    assert read_bytes < index_bytes * 1.01
