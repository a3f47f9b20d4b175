"""Lower bounds on the makespan and the period: what no order can beat, with the reason in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from toolkit.plan.order.problem import Problem


@dataclass(frozen=True)
class Bound:
    """No schedule is shorter than `value`; `reason` says why."""

    value: float
    reason: str


def makespan(problem: Problem) -> Bound:
    """Return the best of the bounds below."""
    found = [longest_path(problem)]
    for device in range(problem.num_devices):
        if problem.on_device[device]:
            found.append(one_device(problem, device))
            found.append(residency(problem, device))
    return max(found, key=lambda bound: bound.value)


def longest_path(problem: Problem) -> Bound:
    """The longest chain of blocks that wait for one another."""
    lengths = [
        problem.heads[i] + block.span + problem.tails[i] for i, block in enumerate(problem.blocks)
    ]
    at = max(range(len(lengths)), key=lengths.__getitem__, default=None)
    if at is None:
        return Bound(0.0, "nothing to run")
    return Bound(lengths[at], f"the longest chain, through {problem.blocks[at]}")


@dataclass(frozen=True)
class Window:
    """A device waits `before` ahead of the first of `blocks`, and `after` behind the last."""

    blocks: frozenset[int]
    before: float
    after: float


def windows(problem: Problem, device: int) -> list[Window]:
    """Return how long `device` must idle around some of its blocks, S.

    Until the first of S starts, the device can run only its other blocks, R. Whatever must run
    elsewhere before S, and shares a device with *every* block of R, runs while this device is idle.
    The same holds after the last of S. For S this takes the blocks on at most k devices, for each
    k: R are then the shared blocks, beside which little can run; with R empty it is the usual bound
    of one machine (head + work + tail).
    """
    row, blocks = problem.on_device[device], problem.blocks
    found = []
    for most in sorted({len(blocks[i].devices) for i in row}):
        chosen = frozenset(i for i in row if len(blocks[i].devices) <= most)
        others = {blocks[i].devices for i in row if len(blocks[i].devices) > most}
        idle = [
            block.span
            if device not in block.devices
            and all(set(other) & set(block.devices) for other in others)
            else 0.0
            for block in blocks
        ]
        # While results travel the device could run R.
        travels = 0.0 if others else 1.0
        head, tail = [0.0] * len(blocks), [0.0] * len(blocks)
        for i in problem.topological:
            for source, delay in problem.sources[i]:
                head[i] = max(head[i], head[source] + idle[source] + travels * delay)
        for i in reversed(problem.topological):
            for user, delay in problem.users[i]:
                tail[i] = max(tail[i], tail[user] + idle[user] + travels * delay)
        found.append(Window(chosen, min(head[i] for i in chosen), min(tail[i] for i in chosen)))
    return found


def one_device(problem: Problem, device: int) -> Bound:
    """Work of a device + the idle time that surrounds it (see `windows`)."""
    busy = problem.busy(device)
    best = max(windows(problem, device), key=lambda window: window.before + window.after)
    return Bound(
        best.before + busy + best.after,
        f"device {device} has work for {busy:g}, and waits {best.before:g} at its head and "
        f"{best.after:g} at its tail",
    )


def residency(problem: Problem, device: int) -> Bound:
    """Memory x time: every microbatch holds memory for at least as long as the way from where it
    is taken to where it is freed; the limit times the window must hold all of it.
    """
    if not math.isfinite(problem.memory_limit) or problem.memory_limit <= 0:
        return Bound(0.0, "no memory limit")
    area, first, last = _held(problem, device)
    if not area:
        return Bound(0.0, f"device {device} holds nothing")
    window = area / problem.memory_limit
    return Bound(
        first + window + last,
        f"what device {device} must hold, for as long as it must, fills its memory for {window:g}",
    )


def _held(problem: Problem, device: int) -> tuple[float, float, float]:
    """(memory x least time held, least head before it is taken, least tail after it is freed)."""
    blocks = problem.blocks
    pairs: dict[tuple[int, int], list[int]] = {}
    for i in problem.on_device[device]:
        if blocks[i].memory:
            stage, _, microbatch = blocks[i].action
            pairs.setdefault((stage, microbatch), []).append(i)
    area, heads, tails = 0.0, [], []
    for row in pairs.values():
        takes = [i for i in row if blocks[i].memory > 0]
        frees = [i for i in row if blocks[i].memory < 0]
        # Only where one block takes all that others free is the least time plain to see.
        if len(takes) != 1 or abs(sum(blocks[i].memory for i in row)) > 1e-9:
            continue
        way = _ways(problem, takes[0])
        if any(i not in way for i in frees):
            continue
        area += sum(-blocks[i].memory * (way[i] + blocks[i].span) for i in frees)
        heads.append(problem.heads[takes[0]])
        tails.append(min(problem.tails[i] for i in frees))
    return area, min(heads, default=0.0), min(tails, default=0.0)


def _ways(problem: Problem, start: int) -> dict[int, float]:
    """The longest way from the start of `start` to the start of all that needs it."""
    found = {start: 0.0}
    for i in problem.topological:
        if i in found:
            for user, delay in problem.users[i]:
                length = found[i] + problem.blocks[i].span + delay
                found[user] = max(found.get(user, 0.0), length)
    return found


def period(one: Problem) -> Bound:
    """Return a bound on the steady-state time per microbatch of a problem of one microbatch: the
    busiest device, or memory x time against the limit.
    """
    found = [Bound(0.0, "nothing to run")]
    for device in range(one.num_devices):
        busy = one.busy(device)
        found.append(Bound(busy, f"device {device} works {busy:g} for each microbatch"))
        if math.isfinite(one.memory_limit) and one.memory_limit > 0:
            area, _, _ = _held(one, device)
            found.append(
                Bound(
                    area / one.memory_limit,
                    f"device {device} holds {area:g} (memory x time) for each microbatch, under a "
                    f"limit of {one.memory_limit:g}",
                )
            )
    return max(found, key=lambda bound: bound.value)
