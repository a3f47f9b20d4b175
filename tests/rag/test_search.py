"""Search equals plain FAISS IVF bit for bit, whatever is resident, evicted, cancelled, failing."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolkit.errors import ToolkitError, UsageError
from toolkit.rag import changes
from toolkit.rag.disk import DirectFile
from toolkit.rag.eviction import POLICIES, policy
from toolkit.rag.search import Found, search
from toolkit.rag.store import Store
from toolkit.rag.tiers import Tiers

NUM_LISTS, COUNT = 24, 1200
Cloud = Callable[..., np.ndarray]


class Made(NamedTuple):
    """A store in two segments with deleted vectors, and what its searches must equal."""

    store: Store
    plain: Any
    deleted: np.ndarray
    largest_bytes: int
    total_bytes: int

    def check(self, found: Found, query: np.ndarray, probes: np.ndarray, k: int) -> None:
        scores, ids = self.plain.search(query, probes, k, self.deleted)
        np.testing.assert_array_equal(found.ids, ids)
        np.testing.assert_array_equal(found.scores.view(np.int32), scores.view(np.int32))


@pytest.fixture(scope="module", params=["f32", "f16", "sq8"])
def made(
    request: pytest.FixtureRequest, make_store: Callable[..., Path], plain: type, cloud: Cloud,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Made]:  # fmt: skip
    path = tmp_path_factory.mktemp("store") / "store"
    vectors = cloud(COUNT)
    make_store(path, vectors, num_lists=NUM_LISTS, encoding=request.param, segments=2)
    deleted = np.arange(0, COUNT, 7)
    changes.delete(path, deleted)
    with contextlib.closing(Store.open(path)) as store:
        sizes = np.concatenate([segment.sizes for segment in store.segments])
        yield Made(store, plain(vectors, path), deleted, int(sizes.max()), int(sizes.sum()))


class MadeUpError(Exception):
    """A disk that fails."""


class _Flaky:
    """A disk whose next reads fail when told to."""

    def __init__(self) -> None:
        self.num_failing = 0

    def __call__(self, file: DirectFile, offset: int, buffers: Sequence[memoryview]) -> None:
        if self.num_failing:
            self.num_failing -= 1
            raise MadeUpError
        file.read(offset, buffers)


_STEPS = ["search", "search", "search", "prefetch", "cancel", "read", "evict", "clear", "fail"]
_OPS = st.lists(
    st.tuples(
        st.sampled_from(_STEPS),
        st.integers(0, 10**6),
    ),
    min_size=3,
    max_size=24,
)


@given(
    ops=_OPS,
    budget=st.floats(0, 1),
    name=st.sampled_from(sorted(POLICIES)),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_search_equals_plain_faiss(
    made: Made, ops: list[tuple[str, int]], budget: float, name: str, seed: int
) -> None:
    _play(made, ops, budget, name, seed)


@pytest.mark.slow
@given(
    ops=_OPS,
    budget=st.floats(0, 1),
    name=st.sampled_from(sorted(POLICIES)),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_search_equals_plain_faiss_at_length(
    made: Made, ops: list[tuple[str, int]], budget: float, name: str, seed: int
) -> None:
    _play(made, ops, budget, name, seed)


def _play(made: Made, ops: list[tuple[str, int]], budget: float, name: str, seed: int) -> None:
    """Do to the tiers what `ops` say, comparing every search; every step keeps the books."""
    room = made.largest_bytes + int(budget * (made.total_bytes - made.largest_bytes))
    disk = _Flaky()
    tiers = Tiers(
        made.store, budget_bytes=room, policy=policy(name), num_readers=0, read=disk
    )  # fmt: skip
    draw = np.random.default_rng(seed)
    prefetches = []
    for op, number in [*ops, ("search", 0)]:
        if op == "search":
            _search(made, tiers, draw, number)
        elif op == "prefetch":
            lists = draw.permutation(NUM_LISTS)[: number % NUM_LISTS]
            prefetches.append(tiers.prefetch(made.store.keys(lists)))
        elif op == "cancel" and prefetches:
            prefetches.pop(number % len(prefetches)).close()
        elif op == "read":
            for _ in range(number % 8):
                tiers.read_one()
        elif op == "evict":
            for key in sorted(tiers.resident())[:: 1 + number % 5]:
                tiers.evict(key)
        elif op == "clear":
            tiers.clear()
        elif op == "fail":
            disk.num_failing = number % 3
        _check_books(tiers)
    tiers.close()


def _search(made: Made, tiers: Tiers, draw: np.random.Generator, number: int) -> None:
    batch = 1 + number % 5
    queries = draw.normal(size=(batch, made.store.quantizer.dims)).astype(np.float32)
    if number % 2:  # near the many equal vectors, so that ties decide
        queries[0] = made.plain.vectors[0]
    probes = [
        made.store.quantizer.rank(query, int(draw.integers(1, NUM_LISTS + 1))) for query in queries
    ]
    k = int(draw.choice([1, 5, 30, 100, COUNT + 1]))
    try:
        result = search(tiers, queries, probes, k)
    except MadeUpError:
        return  # an error or the exact result, nothing between
    for found, query, lists in zip(result.found, queries, probes, strict=True):
        made.check(found, query, lists, k)
    keys = {key for lists in probes for key in made.store.keys(lists)}
    assert result.resident_bytes + result.missing_bytes == sum(map(made.store.num_bytes, keys))


def _check_books(tiers: Tiers) -> None:
    """What is counted is what is there; no scan is in progress here, so nothing is leased."""
    held = [entry for entry in tiers._entries.values() if entry.place is not None]
    assert tiers.arena.used_bytes == sum(entry.num_bytes for entry in held)
    assert tiers.arena.used_bytes <= tiers.arena.budget_bytes
    assert tiers._idle_bytes == tiers.arena.used_bytes
    assert {entry.leases for entry in held} <= {0}
    assert set(tiers._policy._heat) == tiers.resident()
    places = sorted((entry.place, entry.num_bytes) for entry in held)
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(places))


def test_many_searches_at_once_share_what_is_read(made: Made) -> None:
    """Threads, a budget of about a quarter, prefetches that are cancelled: still the same bits."""
    tiers = Tiers(made.store, budget_bytes=made.largest_bytes + made.total_bytes // 4)
    errors: list[BaseException] = []

    def ask(seed: int) -> None:
        draw = np.random.default_rng(seed)
        try:
            for number in range(40):
                query = draw.normal(size=(1, made.store.quantizer.dims)).astype(np.float32)
                lists = made.store.quantizer.rank(query[0], 8)
                ahead = tiers.prefetch(made.store.keys(made.store.quantizer.rank(query[0], 12)))
                if number % 3 == 0:
                    ahead.close()
                found = search(tiers, query, [lists], 10).found[0]
                made.check(found, query[0], lists, 10)
                ahead.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert not any(thread.is_alive() for thread in threads)
    tiers.close()
    _check_books(tiers)
    assert tiers.traffic().read_bytes > 0


def test_a_list_is_read_once_for_all_who_probe_it(made: Made, cloud: Cloud) -> None:
    tiers = Tiers(made.store, budget_bytes=made.total_bytes, num_readers=0)
    queries = cloud(5, seed=9)
    probes = [made.store.quantizer.rank(query, 6) for query in queries]
    result = search(tiers, queries, probes, 3)
    keys = {key for lists in probes for key in made.store.keys(lists)}
    assert tiers.traffic().read_bytes == sum(map(made.store.num_bytes, keys))
    assert result.hit_rate == 0
    assert search(tiers, queries, probes, 3).hit_rate == 1
    assert tiers.traffic().read_bytes == result.missing_bytes
    tiers.close()


def test_a_filter_finds_the_best_of_what_it_lets_through(made: Made, cloud: Cloud) -> None:
    tiers = Tiers(made.store, budget_bytes=made.total_bytes, num_readers=0)
    draw = np.random.default_rng(0)
    for share in (0.0, 0.01, 0.3, 1.0):
        ids = np.flatnonzero(draw.random(COUNT) < share)
        others = np.union1d(np.setdiff1d(np.arange(COUNT), ids), made.deleted)
        among = made.store.among(ids)
        for query in cloud(10, seed=4):
            lists = made.store.quantizer.rank(query, 9)
            (found,) = search(tiers, query[None], [lists], 12, among=among).found
            scores, expected = made.plain.search(query, lists, 12, others)
            np.testing.assert_array_equal(found.ids, expected)
            np.testing.assert_array_equal(found.scores, scores)
    with pytest.raises(UsageError, match=f"give ids from 0 to {COUNT - 1}"):
        made.store.among(np.array([0, COUNT]))
    tiers.close()


def test_queries_that_make_no_sense_are_refused(made: Made, cloud: Cloud) -> None:
    tiers = Tiers(made.store, budget_bytes=made.total_bytes, num_readers=0)
    query, probes = cloud(1), [np.array([0])]
    with pytest.raises(UsageError, match="k is 0"):
        search(tiers, query, probes, 0)
    with pytest.raises(UsageError, match=r"\(2, 24\) for 1 sets of probes"):
        search(tiers, cloud(2), probes, 1)
    with pytest.raises(UsageError, match="for 1 sets of probes and an index of 24 dims"):
        search(tiers, np.ones((1, 5), np.float32), probes, 1)
    for wrong in (-1, NUM_LISTS):
        with pytest.raises(UsageError, match=f"to search; give numbers from 0 to {NUM_LISTS - 1}"):
            search(tiers, query, [np.array([0, wrong])], 1)
    with pytest.raises(UsageError, match="not finite"):
        search(tiers, query * np.nan, probes, 1)
    tiers.close()
    with pytest.raises(ToolkitError, match="closed"):
        search(tiers, query, probes, 1)


def test_an_empty_store_finds_nothing(
    make_store: Callable[..., Path], cloud: Cloud, tmp_path: Path
) -> None:
    path = make_store(tmp_path / "store", cloud(100), num_lists=4)
    changes.delete(path, range(100))
    for _ in range(2):
        with contextlib.closing(Store.open(path)) as store:
            tiers = Tiers(store, budget_bytes=1 << 20, num_readers=0)
            (found,) = search(tiers, cloud(1), [np.arange(4)], 5).found
            assert (len(found.ids), len(found.scores)) == (0, 0)
        changes.compact(path)
