"""Schedules as the search sees them: what a device keeps alive, and how long the whole takes.

A table of few microbatches is timed exactly (order.clock); a long one by two shorter ones, since
from some microbatch on every further one takes the same.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from toolkit.errors import UsageError
from toolkit.plan.order import families
from toolkit.plan.order.clock import Clock
from toolkit.plan.order.pipeline import Order, Stage

# Families a search tries; stages of the others are not a chain of the model's blocks once through.
SEARCHED = ("1f1b", "gpipe", "interleaved", "zb-h1", "zb-v", "dualpipe-v")
# For models that go forward three times and back once, the only one.
RECYCLED, PASSES = "3f1b", 3
# More actions than this and a table is timed by shorter ones, of this many rounds and one more.
_MOST_ACTIONS = 2048
_ROUNDS = 4
# The order of this one is searched for, which takes longer.
_ROUNDS_RECYCLED = 2
# Of a schedule's length, the tiniest span there can be: order.problem wants all above 0.
_NOTHING = 1e-12


class Moment(NamedTuple):
    """How many microbatches of each stage are alive, then how many of those wait for the gradients
    of weights; whether a backward has left gradients by then; which stage's backward is running
    (its place among the device's stages, -1 for none).
    """

    counts: tuple[int, ...]
    begun: bool
    running: int


@dataclass(frozen=True)
class Alive:
    """The fullest moments of a device that has `stages`."""

    stages: tuple[int, ...]
    held: tuple[Moment, ...]

    def most(self, stage: int) -> tuple[int, int]:
        """The most microbatches of a stage that are alive, and that wait; not always at once."""
        place = self.stages.index(stage)
        counts = [moment.counts for moment in self.held]
        wait = place + len(self.stages)
        return max(one[place] for one in counts), max(one[wait] for one in counts)


def possible(family: str, num_devices: int, num_microbatches: int) -> str:
    """Return why a family has no table for these counts; "" when it has one."""
    if num_devices == 1:
        return "" if family == "1f1b" else f"{family} needs several devices"
    if family == RECYCLED:
        return ""
    try:
        _order(family, num_devices, num_microbatches if num_microbatches < 4 * num_devices
               else _short(family, num_devices, num_microbatches))  # fmt: skip
    except UsageError as error:
        return str(error)
    if family == "interleaved" and num_microbatches % num_devices:
        return f"interleaved runs microbatches in groups of {num_devices}"
    return ""


def _short(family: str, num_devices: int, num_microbatches: int) -> int:
    """A count of microbatches that shows what many of them do."""
    return min(num_microbatches, _rounds(family) * num_devices)


def _rounds(family: str) -> int:
    """Rounds of microbatches after which every further one takes the same."""
    return _ROUNDS_RECYCLED if family == RECYCLED else _ROUNDS


def num_chunks(family: str) -> int:
    """Return how many stages a device has."""
    return 2 if family in ("interleaved", "zb-v", "dualpipe-v") else 1


def splits_backward(family: str) -> bool:
    """Whether gradients of inputs and of weights are apart."""
    return family in ("zb-h1", "zb-v", "dualpipe-v")


def bound_s(
    family: str,
    num_devices: int,
    num_microbatches: int,
    forward_s: float,
    backward_s: float,
    weight_s: float,
) -> float:
    """Return seconds that no table of a family undercuts, for what a microbatch takes in all
    stages together: the mean device's work, and the filling and draining around it.

    Narayanan et al. 2021, section 2.2; where gradients of weights fill the bubble (Qi et al. 2023),
    the mean device's wait for its first microbatch, or one microbatch there and back.
    """
    p = num_devices
    mean = num_microbatches * (forward_s + backward_s) / p
    if family == RECYCLED:
        return max(mean, forward_s + backward_s)
    filling = (p - 1) / p * (forward_s + backward_s)
    if splits_backward(family):
        wait = (p - 1) / (2 * p) * forward_s / num_chunks(family)
        return max(mean + wait, forward_s + backward_s - weight_s)
    return mean + filling / num_chunks(family)


@functools.lru_cache(maxsize=1024)
def _order(family: str, num_devices: int, num_microbatches: int) -> Order:
    return families.build(family, num_devices, num_microbatches)


@functools.lru_cache(maxsize=256)
def _clock(family: str, num_devices: int, num_microbatches: int) -> Clock:
    order = _order(family, num_devices, num_microbatches)
    return Clock(order.problem(Stage(), delay=0.0), order.rows)


@functools.lru_cache(maxsize=1024)
def placement(family: str, num_devices: int) -> tuple[int, ...]:
    """Return the device of each stage."""
    chunks = num_chunks(family)
    order = _order(family, num_devices, 2 * num_devices if chunks > 1 else 1)
    return tuple(devices[0] for devices in order.placement[-num_devices * chunks :])


@functools.lru_cache(maxsize=1024)
def alive(family: str, num_devices: int, num_microbatches: int) -> tuple[Alive, ...]:
    """Return what each device keeps alive: from a forward to the last pass that needs it."""
    if family == "gpipe" or num_devices == 1:
        count = num_microbatches if family == "gpipe" else 1
        later = min(count, num_microbatches - 1)
        moments = (Moment((count, 0), False, 0), Moment((later, 0), True, 0))
        return tuple(Alive((device,), moments) for device in range(num_devices))
    order = _order(family, num_devices, _short(family, num_devices, num_microbatches))
    found = []
    for device, row in enumerate(order.rows):
        stages = tuple(
            stage
            for stage, places in enumerate(order.placement)
            if device in places and stage not in order.no_grad
        )
        held = dict.fromkeys(stages, 0)
        waiting = dict.fromkeys(stages, 0)
        every: dict[tuple[bool, int], set[tuple[int, ...]]] = {}
        begun = False
        for stage, kind, _ in row:
            if stage in order.no_grad:
                continue
            if kind in ("B", "I"):
                counts = (*held.values(), *waiting.values())
                every.setdefault((begun, stages.index(stage)), set()).add(counts)
            held[stage] += {"F": 1, "B": -1, "I": 0, "W": -1}[kind]
            waiting[stage] += {"F": 0, "B": 0, "I": 1, "W": -1}[kind]
            begun = begun or kind in ("B", "W")
            every.setdefault((begun, -1), set()).add((*held.values(), *waiting.values()))
        fullest = [
            Moment(counts, *when) for when, found_ in every.items() for counts in _maximal(found_)
        ]
        first = len(order.no_grad)
        found.append(Alive(tuple(stage - first for stage in stages), tuple(fullest)))
    return tuple(found)


def _maximal(every: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those that no other has as much of in every place."""
    return sorted(
        one
        for one in every
        if not any(other != one and all(map(int.__ge__, other, one)) for other in every)
    )


@dataclass(frozen=True)
class Timing:
    """When each device of a schedule ends its last pass, and for how long all compute."""

    ends_s: tuple[float, ...]

    @property
    def length_s(self) -> float:
        return max(self.ends_s)


def timed(
    family: str,
    num_microbatches: int,
    stages: Sequence[Stage],
    delays_s: Sequence[float],
    num_devices: int,
) -> Timing:
    """Return when the devices end, for what one microbatch takes in each stage.

    `delays_s[s]` is what a result takes between stages s and s + 1, where it travels.
    """
    if num_devices == 1:
        one = sum(stage.forward + stage.input_grad + stage.weight_grad for stage in stages)
        return Timing((num_microbatches * one,))
    actions = num_microbatches * num_devices * 3 * num_chunks(family)
    rounds = _rounds(family) * num_devices
    short = actions <= _MOST_ACTIONS and family != RECYCLED
    if short or num_microbatches <= rounds + num_devices:
        return Timing(tuple(_ends(family, num_devices, num_microbatches, stages, delays_s)))
    first = _ends(family, num_devices, rounds, stages, delays_s)
    second = _ends(family, num_devices, rounds + num_devices, stages, delays_s)
    more = (num_microbatches - rounds) / num_devices
    return Timing(tuple(first + more * (second - first)))


def _ends(
    family: str,
    num_devices: int,
    num_microbatches: int,
    stages: Sequence[Stage],
    delays_s: Sequence[float],
) -> Any:
    clock = _clock(family, num_devices, num_microbatches)
    spans = np.maximum(clock.spans(stages), _NOTHING)
    ends = clock.ends(spans, delays=list(delays_s))
    return np.array([max(ends[place] for place in places) for places in clock.problem.on_device])
