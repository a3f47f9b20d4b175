"""The steady state: one microbatch's blocks repeated every `period`, by integer programming.

Tessel (Lin et al., HPCA 2024) calls it the repetend and enumerates which microbatches meet in it.
Here it is one program (periodic event scheduling, Serafini and Ukovich 1989): with u = start /
period and rho = 1 / period, blocks i and j on a common device need an integer k with

    u_j >= u_i + span_i rho + k        u_j + span_j rho <= u_i + k + 1

(j starts after k more microbatches of i than its own, before the next one), a dependency
u_j >= u_i + (span_i + delay) rho, and what a device holds when j starts is a sum of these k. All of
it is linear, so maximising rho gives the least period for any spans, delays and memory limit.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from toolkit.errors import InfeasibleError, UsageError
from toolkit.plan.order import bounds
from toolkit.plan.order.problem import Problem
from toolkit.plan.order.schedule import Schedule


@dataclass(frozen=True)
class Repetend:
    """`together` microbatches of the problem `one`, repeated: block i of the n-th repetition of
    `one.repeat(together)` starts at `offsets[i] + n together period`.

    No steady state of as many together has a period below `at_least`, as far as was proved.
    """

    one: Problem
    period: float
    offsets: tuple[float, ...]
    at_least: float
    together: int = 1

    @property
    def proved(self) -> bool:
        return self.at_least >= self.period * (1 - 1e-6)

    @property
    def length(self) -> float:
        """From the first start in a repetition to the last end."""
        spans = [block.span for block in self.one.blocks] * self.together
        ends = (offset + span for offset, span in zip(self.offsets, spans, strict=True))
        return max(ends) - min(self.offsets)

    def repeat(self, num_microbatches: int) -> Schedule:
        """Return the periodic schedule of this many microbatches, warm-up and cool-down loose."""
        first, size = min(self.offsets), len(self.one.blocks)
        starts = []
        for microbatch in range(num_microbatches):
            n, which = divmod(microbatch, self.together)
            shift = n * self.together * self.period - first
            starts += [o + shift for o in self.offsets[which * size : (which + 1) * size]]
        return Schedule(self.one.repeat(num_microbatches), tuple(starts))


class _Edge(NamedTuple):
    """start[user] >= start[source] + time + k period."""

    source: int
    user: int
    time: float
    k: int


# More microbatches under way between two blocks than this are tried only if it takes them.
_FEW_TURNS = 6


def search(
    one: Problem, *, together: int = 1, time_limit_s: float = 20.0, most_nodes: int = 100_000
) -> Repetend:
    """Return the steady state with the least period, and of those one with the shortest passage of
    a microbatch. With several microbatches `together` the period may be less, since memory comes
    in whole microbatches; the program grows with the square of their blocks.

    Raises InfeasibleError when none was found in time. The result depends on the time only when
    the time ends the search before `most_nodes` do.
    """
    some = one.repeat(together)
    program = _Program(some)
    lower = bounds.period(one).value * together
    num = len(some.blocks)
    period, at_least = math.inf, lower
    offsets: tuple[float, ...] = ()
    # In a chain a block waits less than a period for its turn, so `num` turns are always enough;
    # for other shapes `at_least` is proved for at most that many.
    for most_turns in sorted({min(_FEW_TURNS, num), num}):
        found = program.solve(None, lower, most_turns, time_limit_s / 3, most_nodes)
        if found is not None:
            turns, proved = found
            tight, starts = program.tighten(turns, lower)
            if tight < period:
                period, offsets = tight, starts
            if most_turns == num:
                at_least = max(lower, min(proved, period))
        if period <= lower * (1 + 1e-9):
            break
    if not offsets:
        raise InfeasibleError(
            f"no steady state found for {num} blocks on {one.num_devices} devices "
            f"within {time_limit_s:g} s and a memory of {one.memory_limit:g} per device",
            remedy="allow more memory or more time",
        )
    first = Repetend(one, period / together, offsets, at_least / together, together)
    most_turns = min(num, 1 + math.floor(first.length / period))
    found = program.solve(1 / period, lower, most_turns, time_limit_s / 3, most_nodes)
    if found is not None:
        again, starts = program.tighten(found[0], lower)
        second = Repetend(one, again / together, starts, at_least / together, together)
        if again <= period * (1 + 1e-9) and second.length < first.length:
            return second
    return first


class _Program:
    """The mixed-integer program of one microbatch: variables u, rho, length, then one k a pair."""

    def __init__(self, one: Problem) -> None:
        self.one = one
        blocks = one.blocks
        num = len(blocks)
        self.pairs = [
            (i, j)
            for i in range(num)
            for j in range(i + 1, num)
            if set(blocks[i].devices) & set(blocks[j].devices)
        ]
        self.rho, self.length = num, num + 1
        self.turn = {pair: num + 2 + at for at, pair in enumerate(self.pairs)}
        self.rows: list[dict[int, float]] = []
        self.low: list[float] = []
        self.high: list[float] = []
        for (i, j), k in self.turn.items():
            self._row({j: 1, i: -1, self.rho: -blocks[i].span, k: -1}, 0, math.inf)
            self._row({j: 1, i: -1, self.rho: blocks[j].span, k: -1}, -math.inf, 1)
        for j, sources in enumerate(one.sources):
            for i, delay in sources:
                self._row({j: 1, i: -1, self.rho: -(blocks[i].span + delay)}, 0, math.inf)
            self._row({self.length: 1, j: -1, self.rho: -blocks[j].span}, 0, math.inf)
        if math.isfinite(one.memory_limit):
            for device in range(one.num_devices):
                self._memory(device)

    def _row(self, terms: dict[int, float], low: float, high: float) -> None:
        self.rows.append(terms)
        self.low.append(low)
        self.high.append(high)

    def _memory(self, device: int) -> None:
        """When block j of a microbatch n starts, the device has run microbatches up to n + k of
        block i (one more of those that run before j); j itself takes what it takes.
        """
        blocks = self.one.blocks
        holds = [i for i in self.one.on_device[device] if blocks[i].memory]
        for j in holds:
            if blocks[j].memory < 0:
                continue
            terms: dict[int, float] = {}
            level = blocks[j].memory
            for i in holds:
                if i < j:
                    terms[self.turn[i, j]] = blocks[i].memory
                    level += blocks[i].memory
                elif i > j:  # seen from i: k of (i, j) is -1 - k of (j, i)
                    terms[self.turn[j, i]] = -blocks[i].memory
            self._row(terms, -math.inf, self.one.memory_limit - level + 1e-9)

    def solve(
        self,
        rho: float | None,
        lower: float,
        most_turns: int,
        time_limit_s: float,
        most_nodes: int,
    ) -> tuple[list[int], float] | None:
        """Return (k of each pair, period proved to be the least possible); None if none found.

        Without `rho` the period is minimised; with it, the length at that period. No k is larger
        than `most_turns`.
        """
        num = self.length + 1 + len(self.pairs)
        where = [(r, c, value) for r, row in enumerate(self.rows) for c, value in row.items()]
        matrix = coo_matrix(
            ([v for _, _, v in where], ([r for r, _, _ in where], [c for _, c, _ in where])),
            shape=(len(self.rows), num),
        )
        goal, integral = np.zeros(num), np.zeros(num)
        low, high = np.zeros(num), np.full(num, np.inf)
        low[self.length + 1 :], high[self.length + 1 :] = -most_turns, most_turns
        integral[self.length + 1 :] = 1
        for (i, j), k in self.turn.items():
            # Alike microbatches may be numbered in the order in which they run.
            if self.one.blocks[i].slot == self.one.blocks[j].slot:
                low[k] = high[k] = 0
        if rho is None:
            goal[self.rho], high[self.rho] = -1, 1 / lower
        else:
            # A hair of slack: rho is a rounded number.
            goal[self.length], low[self.rho], high[self.rho] = 1, rho * (1 - 1e-7), rho
        with _quiet():
            result: Any = milp(
                goal,
                constraints=LinearConstraint(matrix.tocsr(), self.low, self.high),
                integrality=integral,
                bounds=Bounds(low, high),
                options={"time_limit": time_limit_s, "node_limit": most_nodes, "mip_rel_gap": 1e-7},
            )
        if result.x is None or result.x[self.rho] <= 0:
            return None
        fastest = -result.mip_dual_bound if rho is None and result.mip_dual_bound else math.inf
        return [round(k) for k in result.x[self.length + 1 :]], 1 / fastest

    def tighten(self, turns: Sequence[int], lower: float) -> tuple[float, tuple[float, ...]]:
        """Return the least period for these k, and the earliest starts: without the solver's
        rounding. A circle of constraints that cannot hold says how much longer the period must be.
        """
        blocks = self.one.blocks
        edges = [
            _Edge(i, j, blocks[i].span + delay, 0)
            for j, sources in enumerate(self.one.sources)
            for i, delay in sources
        ]
        for (i, j), k in zip(self.pairs, turns, strict=True):
            edges += [_Edge(i, j, blocks[i].span, k), _Edge(j, i, blocks[j].span, -k - 1)]
        period = lower
        while True:
            starts, circle = _longest(len(blocks), edges, period)
            if not circle:
                return period, starts
            needed = sum(edge.time for edge in circle) / -sum(edge.k for edge in circle)
            period = max(needed, period * (1 + 1e-12))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS prints lines of its own debugging now and then; stdout may be somebody's JSON. What
    others print meanwhile is passed on.
    """
    sys.stdout.flush()
    saved = os.dup(1)
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(saved, 1)
            os.close(saved)
            printed.seek(0)
            for line in printed:
                if not line.startswith(b"HighsMipSolverData"):
                    os.write(1, line)


def _longest(num: int, edges: list[_Edge], period: float) -> tuple[tuple[float, ...], list[_Edge]]:
    """Earliest starts by Bellman and Ford, or a circle of edges that gains time each round."""
    starts = [0.0] * num
    came_by: list[_Edge | None] = [None] * num
    close = 1e-9 * period
    at = -1
    for _ in range(num + 1):
        at = -1
        for edge in edges:
            start = starts[edge.source] + edge.time + edge.k * period
            if start > starts[edge.user] + close:
                starts[edge.user], came_by[edge.user], at = start, edge, edge.user
        if at < 0:
            return tuple(starts), []
    for _ in range(num):  # into the circle
        edge_in = came_by[at]
        assert edge_in is not None
        at = edge_in.source
    circle: list[_Edge] = []
    first = at
    while not circle or at != first:
        edge_in = came_by[at]
        assert edge_in is not None
        circle.append(edge_in)
        at = edge_in.source
    return tuple(starts), circle


def steady(schedule: Schedule, *, most_blocks: int = 2000) -> Repetend | None:
    """Return the shortest stretch of a schedule that could be repeated for ever, found in it.

    In such a stretch every (stage, kind) starts once, and the stretch followed by itself, the
    microbatches counted on, keeps all dependencies and shares no device. None when there is none.
    """
    problem = schedule.problem
    by_start = sorted(range(len(problem.blocks)), key=lambda i: schedule.starts[i])
    if len(by_start) > most_blocks:
        raise UsageError(
            f"a schedule of {len(by_start)} blocks is too large to look for repetition in; "
            f"at most {most_blocks}"
        )
    slots = list(problem.slots())
    best: Repetend | None = None
    for at in range(len(by_start) - len(slots) + 1):
        # Blocks that start together may be cut anywhere: any order of them is an order by start.
        chosen = by_start[at : at + len(slots)]
        if len({problem.blocks[i].slot for i in chosen}) < len(slots):
            continue
        found = _repeated(schedule, chosen)
        if found is not None and (best is None or found.period < best.period):
            best = found
    return best


def _repeated(schedule: Schedule, chosen: list[int]) -> Repetend | None:
    problem = schedule.problem
    place = {problem.blocks[i].slot: i for i in chosen}
    microbatch = {i: problem.blocks[i].action.microbatch for i in chosen}
    # The least period with which the stretch follows itself, on every device ...
    period = 0.0
    for device in range(problem.num_devices):
        row = [i for i in chosen if device in problem.blocks[i].devices]
        if row:
            last = max(schedule.ends[i] for i in row)
            period = max(period, last - min(schedule.starts[i] for i in row))
    # ... and with what a block needs from another microbatch there in time.
    for i in chosen:
        for source, delay in problem.sources[i]:
            own = place[problem.blocks[source].slot]
            wait = schedule.ends[own] + delay - schedule.starts[i]
            later = microbatch[own] - microbatch[i]  # of the source's microbatch in the stretch
            if later > 0:
                period = max(period, wait / later)
            elif wait > 1e-9 * schedule.makespan:
                return None
    one = _one(problem, microbatch[chosen[0]])
    offsets = tuple(
        schedule.starts[place[block.slot]] - microbatch[place[block.slot]] * period
        for block in one.blocks
    )
    first = min(offsets)
    at_least = bounds.period(one).value
    return Repetend(one, period, tuple(offset - first for offset in offsets), at_least)


def _one(problem: Problem, microbatch: int) -> Problem:
    blocks = tuple(block for block in problem.blocks if block.action.microbatch == microbatch)
    return Problem(blocks, problem.num_devices, problem.memory_limit)
