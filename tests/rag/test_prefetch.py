"""Lookahead on a throttled disk and a clock that only moves when told: the same every time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from toolkit.rag.disk import throttled
from toolkit.rag.prefetch import Ahead, Lookahead, Pace
from toolkit.rag.search import search
from toolkit.rag.store import Store
from toolkit.rag.tiers import Tiers, Traffic

NUM_LISTS, NPROBE, NUM_TOKENS, TOKEN_S = 64, 8, 40, 0.05


class Machine:
    """A store on a simulated disk beside a simulated generator, on one made-up clock."""

    def __init__(self, store: Store, bytes_per_s: float, budget_bytes: int) -> None:
        self.now_s = 0.0
        self.pace = Pace(bytes_per_s=bytes_per_s, token_s=TOKEN_S)
        read = throttled(bytes_per_s, clock=self.clock, sleep=self.sleep)
        self.tiers = Tiers(
            store, budget_bytes=budget_bytes, num_readers=0, read=read, clock=self.clock
        )

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def retrieve(
        self, question: np.ndarray, text: Callable[[float], np.ndarray], **how: int
    ) -> tuple[Ahead, float, np.ndarray]:
        """Generate for a question, then search; `text(share)` is the vector of what is there then.

        Returns what lookahead did, the seconds from the text's end to the result, and the ids.
        """
        start_s = self.now_s
        with Lookahead(self.tiers, self.pace, nprobe=NPROBE, **how) as ahead:
            ahead.begin(question, NUM_TOKENS)
            for token in range(1, NUM_TOKENS + 1):
                while self.now_s < start_s + token * TOKEN_S and self.tiers.read_one():
                    pass
                self.now_s = max(self.now_s, start_s + token * TOKEN_S)
                if ahead.due(token):
                    ahead.revise(text(token / NUM_TOKENS))
            final = text(1.0)
            probes = self.tiers.store.quantizer.rank(final, NPROBE)
            done = ahead.settle(probes, NUM_TOKENS * TOKEN_S)
            end_s = self.now_s
            found = search(self.tiers, final[None], [probes], 10).found[0]
            return done, self.now_s - end_s, found.ids


@pytest.fixture(scope="module")
def store(
    make_store: Callable[..., Path], cloud: Callable[..., np.ndarray],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Store]:  # fmt: skip
    path = make_store(
        tmp_path_factory.mktemp("store") / "store", cloud(12_000), num_lists=NUM_LISTS
    )
    with contextlib.closing(Store.open(path)) as opened:
        yield opened


def _total(store: Store) -> int:
    return int(store.segments[0].sizes.sum())


def _drift(seed: int) -> tuple[np.ndarray, Callable[[float], np.ndarray]]:
    """A question, and a text that begins like it and ends up elsewhere."""
    draw = np.random.default_rng(seed)
    question, other = draw.normal(size=(2, 24)).astype(np.float32)

    def text(share: float) -> np.ndarray:
        mixed = question + 1.2 * share * other
        return (mixed / np.linalg.norm(mixed)).astype(np.float32)

    return question / np.linalg.norm(question), text


def _run(store: Store, **how: int) -> tuple[list[Ahead], float, list[list[int]], Traffic]:
    """Answer 20 questions, each on a cold machine; return also the total wait and traffic."""
    # In the window the disk can bring half of all lists, four times what is probed.
    bytes_per_s = _total(store) / 2 / (NUM_TOKENS * TOKEN_S)
    machine = Machine(store, bytes_per_s, 2 * _total(store))
    done, waits_s, ids = [], 0.0, []
    for seed in range(20):
        machine.tiers.clear()
        ahead, wait_s, found = machine.retrieve(*_drift(seed), **how)
        done.append(ahead)
        waits_s += wait_s
        ids.append(found.tolist())
    return done, waits_s, ids, machine.tiers.traffic()


def _hit_rate(done: list[Ahead]) -> float:
    return sum(a.resident_bytes for a in done) / sum(a.wanted_bytes for a in done)


def test_lookahead_hides_reads_and_instalments_hide_more(store: Store) -> None:
    none, none_s, exact, _ = _run(store, multiple=0)
    once, once_s, ids_once, _ = _run(store, num_instalments=1)
    parts, parts_s, ids_parts, traffic = _run(store, num_instalments=4)
    assert ids_once == ids_parts == exact
    assert _hit_rate(none) == 0
    assert _hit_rate(once) > 0.4
    assert _hit_rate(parts) > _hit_rate(once) + 0.1
    assert parts_s < once_s < none_s
    for ahead in (*once, *parts):
        assert ahead.read_bytes <= ahead.budget_bytes
        assert ahead.used_bytes == ahead.resident_bytes  # every machine was cold
        assert ahead.wasted_bytes == ahead.read_bytes - ahead.used_bytes
    assert traffic.lookahead_bytes == sum(ahead.read_bytes for ahead in parts)


def test_the_same_run_gives_the_same_numbers(store: Store) -> None:
    assert _run(store) == _run(store)


def test_a_short_window_is_not_overspent(store: Store) -> None:
    """The disk brings one list or so in the window: that is what is asked for, the best first."""
    largest = int(store.segments[0].sizes.max())
    bytes_per_s = 1.5 * largest / (NUM_TOKENS * TOKEN_S)
    machine = Machine(store, bytes_per_s, _total(store))
    question, _ = _drift(0)
    done, _, _ = machine.retrieve(question, lambda share: question, num_instalments=1)
    assert 0 < done.read_bytes <= done.budget_bytes <= 1.5 * largest
    assert done.used_bytes == done.read_bytes
    assert machine.tiers.traffic().cancelled_bytes == 0


def test_a_lookahead_takes_no_more_than_its_share_of_memory(store: Store) -> None:
    machine = Machine(store, 1e12, _total(store) // 8)
    question, text = _drift(1)
    done, _, _ = machine.retrieve(question, text, arena_share=0.25)  # type: ignore[arg-type]
    assert done.budget_bytes == machine.tiers.arena.budget_bytes // 4
    assert done.read_bytes <= done.budget_bytes


def test_leaving_early_cancels_what_waits(store: Store) -> None:
    machine = Machine(store, 1e6, _total(store))
    question, text = _drift(2)
    with Lookahead(machine.tiers, machine.pace, nprobe=NPROBE) as ahead:
        ahead.begin(question, NUM_TOKENS)
        assert machine.tiers.read_one()
        ahead.revise(text(0.25))
    assert not machine.tiers.read_one()
    assert all(entry.wanted == 0 for entry in machine.tiers._entries.values())


def test_lookaheads_at_once_with_real_readers_change_no_result(store: Store) -> None:
    """Threads begin, revise, settle and leave in each other's way, in a third of the memory."""
    tiers = Tiers(store, budget_bytes=_total(store) // 3)
    quiet = Tiers(store, budget_bytes=_total(store), num_readers=0)
    pace = Pace(bytes_per_s=1e9)
    wrong: list[object] = []

    def ask(first: int) -> None:
        try:
            for seed in range(first, first + 15):
                question, text = _drift(seed)
                probes = store.quantizer.rank(text(1.0), NPROBE)
                with Lookahead(tiers, pace, nprobe=NPROBE, num_instalments=3) as ahead:
                    ahead.begin(question, NUM_TOKENS)
                    ahead.revise(text(0.3))
                    ahead.revise(text(0.6))
                    done = ahead.settle(probes, 2.0)
                    found = search(tiers, text(1.0)[None], [probes], 10).found[0]
                with lock:
                    right = search(quiet, text(1.0)[None], [probes], 10).found[0]
                if found.ids.tolist() != right.ids.tolist() or done.wasted_bytes < 0:
                    wrong.append((found, right, done))
        except BaseException as error:
            wrong.append(error)

    lock = threading.Lock()
    threads = [threading.Thread(target=ask, args=(100 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert not any(thread.is_alive() for thread in threads)
    tiers.close()
    assert all(entry.wanted == entry.leases == 0 for entry in tiers._entries.values())
    assert tiers.arena.used_bytes <= tiers.arena.budget_bytes


def test_pace_is_measured(store: Store) -> None:
    machine = Machine(store, 4e6, _total(store))
    machine.pace = Pace(bytes_per_s=1.0, token_s=1.0)
    question, text = _drift(3)
    machine.retrieve(question, text)
    assert machine.pace.token_s == pytest.approx(TOKEN_S)
    machine.pace.generated(10, 10 * TOKEN_S * 2)
    assert machine.pace.token_s == pytest.approx(1.3 * TOKEN_S)
    before = machine.tiers.traffic()
    search(machine.tiers, question[None], [np.arange(NUM_LISTS)], 1)
    machine.pace = Pace()
    machine.pace.read(before, machine.tiers.traffic())
    assert machine.pace.bytes_per_s == pytest.approx(4e6)
