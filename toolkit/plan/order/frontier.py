"""Exact search over partial schedules, cut to a beam while there is no time for all of them.

A partial schedule appends blocks to the rows of their devices. Microbatches are alike, so only how
many of each (stage, kind) were appended matters, not which: partial schedules with the same counts
are compared, and one that is nowhere earlier than another is dropped. Widths grow until nothing was
cut (the best schedule found is then optimal), a bound is met, or the time is up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from toolkit.plan.order import bounds
from toolkit.plan.order.problem import Problem
from toolkit.plan.order.schedule import Schedule

WIDTHS = (4, 32, 256, 2048, 16384)


class _State(NamedTuple):
    """Rows so far: how many of each group were appended, what is still looked at, how it came."""

    bound: float
    idle: float
    counts: tuple[int, ...]
    free_at: tuple[float, ...]
    held: tuple[float, ...]
    ends: tuple[tuple[float, ...], ...]  # of each group, in order
    left: tuple[float, ...]  # work of each device


@dataclass(frozen=True)
class Found:
    """The best schedule, if any is shorter than what was asked for; whether that is proved."""

    schedule: Schedule | None
    proved: bool


def search(
    problem: Problem,
    *,
    shorter_than: float = math.inf,
    time_limit_s: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """Return a schedule shorter than `shorter_than`, the shortest where `proved`.

    `proved` without a schedule: there is none. The result depends on `time_limit_s` only by how
    many of WIDTHS were tried to their end.
    """
    deadline = clock() + time_limit_s
    space = _Space(problem)
    lower = bounds.makespan(problem).value
    best: Schedule | None = None
    limit = shorter_than
    for width in WIDTHS:
        schedule, complete = space.descend(width, limit, lambda: clock() > deadline)
        if schedule is not None:
            best, limit = schedule, schedule.makespan
        if complete or limit <= lower * (1 + 1e-12):
            return Found(best, proved=True)
        if clock() > deadline:
            break
    return Found(best, proved=False)


class _Space:
    """The problem by groups of blocks that are alike but for their microbatch."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.groups = _groups(problem)
        place = {i: (g, at) for g, group in enumerate(self.groups) for at, i in enumerate(group)}
        self.group_of = place
        self.sources = [
            [[(*place[source], delay) for source, delay in problem.sources[i]] for i in group]
            for group in self.groups
        ]
        self.users = [
            sorted({place[user][0] for i in group for user, _ in problem.users[i]})
            for group in self.groups
        ]
        # For each device: the groups of the window with the longest tail, and that tail.
        self.tails = []
        for device in range(problem.num_devices):
            if problem.on_device[device]:
                window = max(bounds.windows(problem, device), key=lambda w: w.after)
                self.tails.append(({place[i][0] for i in window.blocks}, window.after))
            else:
                self.tails.append((set(), 0.0))

    def descend(
        self, width: int, limit: float, out_of_time: Callable[[], bool]
    ) -> tuple[Schedule | None, bool]:
        """Append block by block, keeping `width` partial schedules; also whether none was cut."""
        problem = self.problem
        left = tuple(problem.busy(device) for device in range(problem.num_devices))
        zeros = (0.0,) * problem.num_devices
        none = (0,) * len(self.groups)
        layer = [_State(0.0, 0.0, none, zeros, zeros, ((),) * len(self.groups), left)]
        complete = True
        for _ in problem.blocks:
            by_counts: dict[tuple[int, ...], dict[tuple[float, ...], _State]] = {}
            for number, state in enumerate(layer):
                if number % 64 == 0 and out_of_time():
                    return None, False
                for child in self._children(state, limit):
                    alike = by_counts.setdefault(child.counts, {})
                    key = self._looked_at(child)
                    if key not in alike or child.bound < alike[key].bound:
                        alike[key] = child
            layer = [state for alike in by_counts.values() for state in _undominated(alike)]
            layer.sort(key=lambda state: (state.bound, state.idle, state.counts, state.free_at))
            complete = complete and len(layer) <= width
            del layer[width:]
        if not layer:
            return None, complete
        best = layer[0]
        starts = [math.nan] * len(problem.blocks)
        for group, ends in zip(self.groups, best.ends, strict=True):
            for i, end in zip(group, ends, strict=True):
                starts[i] = end - problem.blocks[i].span
        return Schedule(problem, tuple(starts)), complete

    def _children(self, state: _State, limit: float) -> Iterator[_State]:
        problem, blocks = self.problem, self.problem.blocks
        most = problem.memory_limit * (1 + 1e-9)
        can_start = []
        for g, group in enumerate(self.groups):
            at = state.counts[g]
            if at == len(group):
                continue
            block = blocks[group[at]]
            if any(state.held[d] + block.memory > most for d in block.devices):
                continue
            start = max(state.free_at[d] for d in block.devices)
            for source, position, delay in self.sources[g][at]:
                if state.counts[source] <= position:
                    break
                start = max(start, state.ends[source][position] + delay)
            else:
                can_start.append((g, block, start))
        for g, block, start in can_start:
            # Another block that fits into the time this one would leave idle goes first.
            if any(
                other.memory <= 0
                and before + other.span <= start
                and set(other.devices) <= set(block.devices)
                for _, other, before in can_start
            ):
                continue
            child = self._append(state, g, start)
            if child.bound < limit * (1 - 1e-12):
                yield child

    def _append(self, state: _State, g: int, start: float) -> _State:
        problem = self.problem
        i = self.groups[g][state.counts[g]]
        block = problem.blocks[i]
        end = start + block.span
        counts = list(state.counts)
        counts[g] += 1
        free_at, held, left = list(state.free_at), list(state.held), list(state.left)
        bound = max(state.bound, end + problem.tails[i])
        for device in block.devices:
            free_at[device] = end
            held[device] += block.memory
            left[device] -= block.span
        idle = 0.0
        for device, (groups, after) in enumerate(self.tails):
            work = free_at[device] + left[device]
            idle += work
            if device in block.devices:
                remains = any(counts[other] < len(self.groups[other]) for other in groups)
                bound = max(bound, work + (after if remains else 0.0))
        ends = (*state.ends[:g], (*state.ends[g], end), *state.ends[g + 1 :])
        return _State(bound, idle, tuple(counts), tuple(free_at), tuple(held), ends, tuple(left))

    def _looked_at(self, state: _State) -> tuple[float, ...]:
        """All times that what is still to be appended may depend on."""
        times = list(state.free_at)
        for g, ends in enumerate(state.ends):
            if self.users[g]:
                times.extend(ends[min(state.counts[user] for user in self.users[g]) :])
        return tuple(times)


def _undominated(alike: dict[tuple[float, ...], _State], most: int = 64) -> list[_State]:
    """The states that no other beats in every time looked at (compared with `most` others)."""
    kept: list[tuple[tuple[float, ...], _State]] = []
    for times, state in sorted(alike.items(), key=lambda item: (sum(item[0]), item[1].bound)):
        for others, other in kept[:most]:
            if other.bound <= state.bound and all(map(float.__le__, others, times)):
                break
        else:
            kept.append((times, state))
    return [state for _, state in kept]


def _groups(problem: Problem) -> list[list[int]]:
    """Blocks by (stage, kind) where microbatches are alike and independent, else each alone."""
    by_slot: dict[tuple[int, str], list[int]] = {}
    for i, block in enumerate(problem.blocks):
        by_slot.setdefault(block.slot, []).append(i)
    first = {slot: problem.blocks[group[0]] for slot, group in by_slot.items()}

    def like_first(i: int) -> bool:
        block, model = problem.blocks[i], first[problem.blocks[i].slot]
        edges = [
            [(e.source.stage, e.source.kind, e.source.microbatch - b.action.microbatch, e.delay)
             for e in b.after]
            for b in (block, model)
        ]  # fmt: skip
        return (
            (block.devices, block.span, block.memory) == (model.devices, model.span, model.memory)
            and edges[0] == edges[1]
            and all(moved == 0 for _, _, moved, _ in edges[0])
        )

    everywhere = {block.action.microbatch for block in problem.blocks}
    same = all(len(group) == len(everywhere) for group in by_slot.values())
    if same and all(map(like_first, range(len(problem.blocks)))):
        return [
            sorted(group, key=lambda i: problem.blocks[i].action.microbatch)
            for group in by_slot.values()
        ]
    return [[i] for i in range(len(problem.blocks))]
