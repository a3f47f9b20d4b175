"""Searches in groups: the same results, fewer reads, and nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from toolkit.errors import UsageError
from toolkit.rag.batch import Grouping, choose
from toolkit.rag.retriever import Retriever
from toolkit.rag.search import search
from toolkit.rag.store import Store
from toolkit.rag.tiers import Tiers

Cloud = Callable[..., np.ndarray]


class Bare(Retriever):
    """Searches a store of vectors; a passage is its id."""

    def __init__(self, store: Store, tiers: Tiers) -> None:
        super().__init__(store, None, tiers)  # type: ignore[arg-type]

    def passage(self, passage_id: int, store: Store | None = None) -> Any:
        return SimpleNamespace(id=passage_id)


def _waiting(since_s: float, *lists: int) -> Any:
    return SimpleNamespace(since_s=since_s, lists=frozenset(lists))


def test_groups_share_lists_and_the_old_go_first() -> None:
    sizes = np.ones(10, int)
    a, b, c, d = (_waiting(0, 1, 2), _waiting(1, 7, 8), _waiting(2, 2, 3), _waiting(3, 8, 9))
    never = -1.0
    assert choose([a, b, c, d], 2, hot=frozenset({8, 9}), old_s=never, sizes=sizes) == [d, b]
    assert choose([a, b, c, d], 2, hot=frozenset({8, 9}), old_s=0.5, sizes=sizes) == [a, c]
    assert choose([a], 4, hot=frozenset(), old_s=never, sizes=sizes) == [a]
    heavy = sizes.copy()
    heavy[7] = 100  # bytes count, not lists
    assert choose([b, c], 1, hot=frozenset({3, 8}), old_s=never, sizes=heavy) == [c]


@pytest.fixture
def made(make_store: Callable[..., Path], cloud: Cloud, tmp_path: Path) -> Bare:
    store = Store.open(make_store(tmp_path / "store", cloud(3000), num_lists=48))
    return Bare(store, Tiers(store, budget_bytes=store.num_bytes_held // 4))


def test_grouped_searches_find_what_single_ones_do(made: Bare, cloud: Cloud) -> None:
    queries = cloud(40, seed=5)
    alone = [
        search(made.tiers, query[None], [made.rank(query, 6)], 5).found[0].ids.tolist()
        for query in queries
    ]
    grouping = Grouping(made, wait_s=0.05)
    with ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(grouping.retrieve, query, 5, 6) for query in queries]
        found = [[hit.passage.id for hit in each.result(timeout=60)] for each in futures]
    assert found == alone
    assert grouping.num_searches == 40
    assert grouping.num_groups < 30
    with pytest.raises(UsageError, match="nprobe is 99"):
        grouping.retrieve(queries[0], 5, 99)
    with pytest.raises(UsageError, match="not finite"):
        grouping.retrieve(np.full(24, np.nan, np.float32), 5, 6)
    assert len(grouping.retrieve(queries[0], 5, 6)) == 5  # it lives on
    grouping.close()


def test_groups_read_fewer_bytes_than_the_order_of_arrival(made: Bare, cloud: Cloud) -> None:
    """Questions on twelve subjects, all mixed: those on one subject share their lists."""
    queries = cloud(96, seed=6)
    probes = [made.rank(query, 6) for query in queries]
    waiting = [
        SimpleNamespace(since_s=0.0, lists=frozenset(each.tolist()), at=i)
        for i, each in enumerate(probes)
    ]
    groups, left, hot = [], waiting, frozenset()
    while left:
        group = choose(left, 8, hot=hot, old_s=-1, sizes=made.store.list_nums())
        hot = frozenset().union(*(each.lists for each in group))
        left = [each for each in left if each not in group]
        groups.append([each.at for each in group])
    assert sorted(at for group in groups for at in group) == list(range(96))

    def read(order: list[list[int]]) -> int:
        made.tiers.clear()
        before = made.tiers.traffic().read_bytes
        for group in order:
            search(made.tiers, queries[group], [probes[at] for at in group], 5)
        return made.tiers.traffic().read_bytes - before

    arrival = [list(range(at, at + 8)) for at in range(0, 96, 8)]
    assert read(arrival) > 1.2 * read(groups)


def test_closing_finishes_what_waits(made: Bare, cloud: Cloud) -> None:
    grouping = Grouping(made, wait_s=5.0)
    found: list[Any] = []
    asking = threading.Thread(target=lambda: found.append(grouping.retrieve(cloud(1)[0], 3, 4)))
    asking.start()
    while not grouping._queue and not found:
        pass
    grouping.close()
    asking.join(timeout=20)
    assert len(found) == 1
