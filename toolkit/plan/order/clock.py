"""Time a table fast and often: compiled once into arrays, then run with any spans.

Devices run their rows in order, each action as early as its row and what it waits for allow. All
actions that depend on the same number of others in a row form a level; a level is one vector
operation, so the time goes with the length of the table, hardly with its width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from toolkit.errors import FormatError
from toolkit.plan.order import deadlock
from toolkit.plan.order.action import Rows
from toolkit.plan.order.pipeline import Order, Stage
from toolkit.plan.order.problem import Problem
from toolkit.plan.order.schedule import Schedule

_KINDS = {"F": 0, "B": 1, "I": 2, "W": 3}


class Clock:
    """`rows` of `problem`, ready to be timed. Raises FormatError when they deadlock."""

    def __init__(self, problem: Problem, rows: Rows) -> None:
        faults = deadlock.find(problem, rows)
        if faults:
            raise FormatError("the table cannot be run: " + "; ".join(map(str, faults[:3])))
        self.problem = problem
        # Per block (who it comes after, delay, boundary between stages or -1).
        before: list[list[tuple[int, float, int]]] = [
            [(source, delay, self._boundary(source, i)) for source, delay in sources]
            for i, sources in enumerate(problem.sources)
        ]
        after: list[list[int]] = [[user for user, _ in users] for users in problem.users]
        for row in rows:
            places = [problem.index[action] for action in row]
            for first, second in pairwise(places):
                before[second].append((first, 0.0, -1))
                after[first].append(second)
        self._levels = _levels([len(sources) for sources in before], after)
        # A row of edges per level, padded with a place that always ends at 0 and has no delay.
        nothing = (len(problem.blocks), 0.0, -1)
        self._sources: list[Any] = []
        self._delays: list[Any] = []
        self._boundaries: list[Any] = []
        for level in self._levels:
            width = max((len(before[i]) for i in level), default=0)
            padded = [before[i] + [nothing] * (width - len(before[i])) for i in level]
            edges = np.array(padded, dtype=float).reshape(len(level), width, 3)
            self._sources.append(edges[:, :, 0].astype(int))
            self._delays.append(edges[:, :, 1])
            self._boundaries.append(edges[:, :, 2].astype(int))
        self._spans = np.array([block.span for block in problem.blocks])
        slots = [(block.action.stage, _KINDS[block.action.kind]) for block in problem.blocks]
        self._slots = np.array(slots).reshape(-1, 2)

    def _boundary(self, source: int, user: int) -> int:
        """The place in a list of delays between stages s and s + 1; -1 where nothing travels."""
        here, there = self.problem.blocks[source], self.problem.blocks[user]
        if here.devices == there.devices or set(there.devices) <= set(here.devices):
            return -1
        return min(here.action.stage, there.action.stage)

    def ends(self, spans: Any = None, *, delays: Sequence[float] | None = None) -> Any:
        """Return when each block ends, for `spans` (num_blocks) or (num_blocks, num_trials).

        Without `spans` those of the problem. `delays[s]` is what a result takes between stages s
        and s + 1, where they are on different devices; without it, the problem's own.
        """
        spans = self._spans if spans is None else np.asarray(spans, dtype=float)
        ends = np.zeros((spans.shape[0] + 1, *spans.shape[1:]))
        table = None if delays is None else np.array([*delays, 0.0])
        for level, sources, own, boundaries in zip(
            self._levels, self._sources, self._delays, self._boundaries, strict=True
        ):
            if sources.shape[1] == 0:
                ends[level] = spans[level]
                continue
            ready = ends[sources]
            added = own if table is None else table[boundaries]
            if added.any():
                ready = ready + added.reshape(added.shape + (1,) * (spans.ndim - 1))
            ends[level] = ready.max(axis=1) + spans[level]
        return ends[:-1]

    def makespan(self, spans: Any = None, *, delays: Sequence[float] | None = None) -> Any:
        """Return when the last block ends: a number, or one per trial."""
        return self.ends(spans, delays=delays).max(axis=0, initial=0.0)

    def spans(self, stages: Sequence[Stage]) -> Any:
        """Return the span of each block under other costs of the stages, for `ends`."""
        table = np.array([[stage.span(kind) for kind in _KINDS] for stage in stages])
        return table[self._slots[:, 0], self._slots[:, 1]]

    def schedule(self) -> Schedule:
        """Return the table's schedule with the problem's own spans."""
        return Schedule(self.problem, tuple((self.ends() - self._spans).tolist()))


def _levels(missing: list[int], after: list[list[int]]) -> list[Any]:
    """Blocks after nothing, then those after these alone, and so on; uses up `missing`."""
    level = [i for i, count in enumerate(missing) if count == 0]
    found = []
    while level:
        found.append(np.array(level))
        following = []
        for i in level:
            for user in after[i]:
                missing[user] -= 1
                if missing[user] == 0:
                    following.append(user)
        level = following
    return found


def run(
    order: Order,
    stages: Stage | Sequence[Stage] = Stage(),  # noqa: B008 -- frozen
    *,
    delay: float | Sequence[float] = 0.0,
) -> Schedule:
    """Return the schedule of an order's table under these costs (see `Order.problem`)."""
    return Clock(order.problem(stages, delay=delay), order.rows).schedule()
