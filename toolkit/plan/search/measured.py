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

# What is within this of the fastest is as fast: steps on a shared machine differ by more.
_ALIKE = 1.03


@dataclass(frozen=True)
class Timed:
    """A finalist and what its steps took."""

    finalist: Finalist
    measured: Measured


def fastest(
    found: Found, count: int, *, progress: measure.Progress = lambda _done, _total: None
) -> tuple[Found, tuple[Timed, ...]]:
    """Time the first `count` finalists; return what was found with the plan whose step was the
    shortest within rounds, and all, the plan first. Of those that are as fast within 3 %, the one
    predicted to be the fastest is kept. The plan remembers what the others took.

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
    least = min(one.measured.relative or 0.0 for one in able)
    kept = next(one for one in able if (one.measured.relative or 0.0) <= _ALIKE * least)
    able.sort(key=lambda one: (one is not kept, one.measured.relative))
    others = [one for one in timed if one not in able]
    chosen = replace(found, plan=_chosen(found.plan, able), best=able[0].finalist.candidate)
    return chosen, (*able, *others)


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
