"""The last word where the machine is at hand: the fastest few timed on it, the fastest kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from toolkit.errors import ToolkitError
from toolkit.plan import measure
from toolkit.plan.measure import Measured
from toolkit.plan.plan import Plan
from toolkit.plan.search.finalists import Finalist
from toolkit.plan.search.found import Found
from toolkit.units import format_seconds

# What is faster in so many of the rounds is faster: of 8 that are tossed, 7 agree once in 28.
_SURE = 7 / 8
# What is within this of the fastest after the first rounds is timed for so many more.
_CLOSE = 1.1
_MORE_ROUNDS = 5


@dataclass(frozen=True)
class Timed:
    """A finalist and what its steps took."""

    finalist: Finalist
    measured: Measured


def fastest(
    found: Found, count: int, *, progress: measure.Progress = lambda _done, _total: None
) -> tuple[Found, tuple[Timed, ...]]:
    """Time the first `count` finalists, and for longer those that are close; return what was found
    with the plan that is kept, and all, it first. A plan gives way only to one that was faster in
    seven of eight rounds, in the order in which they are predicted: steps on a shared machine
    differ by more than plans do. The plan remembers what the others took.

    Raises ToolkitError when none could be run.
    """
    last = found.finalists[:count]
    times = measure.measure([one.plan for one in last], progress=progress)
    timed = [Timed(one, time) for one, time in zip(last, times, strict=True)]
    able = [one for one in timed if one.measured.relative is not None]
    if not able:
        raise ToolkitError(
            f"none of {len(timed)} plans could be run here: {timed[0].measured.refused}",
            remedy="search without measuring",
        )
    least = min(map(_relative, able))
    slower = [one for one in able if _relative(one) > _CLOSE * least]
    close = [one for one in able if one not in slower]
    if len(close) > 1:
        close = _longer(close, progress)
    kept = close[0]
    for one in close[1:]:
        if _is_faster(one, kept):
            kept = one
    close.sort(key=lambda one: (one is not kept, _relative(one)))
    able = [*close, *sorted(slower, key=_relative)]
    others = [one for one in timed if one.measured.relative is None]
    chosen = replace(found, plan=_chosen(found.plan, able), best=able[0].finalist.candidate)
    return chosen, (*able, *others)


def _longer(close: Sequence[Timed], progress: measure.Progress) -> list[Timed]:
    plans = [one.finalist.plan for one in close]
    more = measure.measure(plans, rounds=_MORE_ROUNDS, progress=progress)
    times = measure.prolonged([one.measured for one in close], more)
    return [Timed(one.finalist, time) for one, time in zip(close, times, strict=True)]


def _is_faster(one: Timed, other: Timed) -> bool:
    """Whether a plan's steps were shorter in nearly all rounds."""
    pairs = list(zip(one.measured.rounds_s, other.measured.rounds_s, strict=True))
    return sum(mine < its for mine, its in pairs) >= _SURE * len(pairs)


def _relative(one: Timed) -> float:
    assert one.measured.relative is not None
    return one.measured.relative


def _chosen(first: Plan, timed: Sequence[Timed]) -> Plan:
    """The fastest, remembering the other plans with their measured steps."""
    best, *others = timed
    measured = {
        one.finalist.candidate.description: one.finalist.candidate.alternative(
            f"measured {format_seconds(one.measured.step_s or 0.0)} here, the plan itself "
            f"{format_seconds(best.measured.step_s or 0.0)}"
        )
        for one in others
    }
    known = {one.description: one for one in first.considered}
    known.pop(best.finalist.candidate.description, None)
    return replace(best.finalist.plan, considered=tuple({**known, **measured}.values()))
