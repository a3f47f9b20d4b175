"""`search`: from a subject and a cluster to a plan, the frontier, and what would change it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from toolkit.cost.calibration import Calibration
from toolkit.errors import InfeasibleError
from toolkit.garbage import uncollected
from toolkit.hardware import Cluster
from toolkit.hardware.scaled import scaled
from toolkit.plan import chain, predict, recycling
from toolkit.plan.plan import PIPELINED_WAYS, Plan
from toolkit.plan.search.constraints import Constraints
from toolkit.plan.search.extras import Extras, Written
from toolkit.plan.search.finalists import FEWEST, NEARLY, Finalist, finalists
from toolkit.plan.search.frontier import Candidate
from toolkit.plan.search.outer import Outer, Progress
from toolkit.plan.search.space import Ground
from toolkit.plan.subject import Subject
from toolkit.units import format_bytes

# How much more of a resource is asked about.
_MORE = 1.1
_GROUNDS_AGAIN = 2
# Of a time limit, what the search composes itself has this share; the library's plans the rest.
_COMPOSING = 0.6
# Without a time limit.
_FOR_EVER = 1e9


@dataclass(frozen=True)
class Change:
    """What 10 % more of something would change: the best step then, and the candidate it is of."""

    what: str
    step_s: float
    description: str


@dataclass(frozen=True)
class Found:
    """What a search found. `plan` is predicted, as are `finalists`, itself the first of them;
    `frontier` and `runner_up` are estimated.

    `considered` candidates were estimated, `pruned` grounds left out because a bound was beaten;
    `complete` is False when time ran out. `binding` says what keeps the plan from being faster.
    """

    plan: Plan
    best: Candidate | Written
    frontier: tuple[Candidate | Written, ...]
    runner_up: Candidate | Written | None
    finalists: tuple[Finalist, ...]
    considered: int
    pruned: int
    seconds: float
    complete: bool
    binding: str
    changes: tuple[Change, ...]


@uncollected()
def search(
    subject: Subject,
    cluster: Cluster,
    *,
    num_ranks: int | None = None,
    memory_limit_bytes: float | None = None,
    time_limit_s: float | None = None,
    constraints: Constraints | None = None,
    calibration: Calibration | None = None,
    num_finalists: int = FEWEST,
    varied: bool = False,
    progress: Progress = lambda _doing, _best_s: None,
) -> Found:
    """Return the best plan found for `subject` on `num_ranks` devices (default: all).

    So many as `num_finalists` are predicted in full; for a measurement they are `varied`: sizes of
    microbatches that are predicted nearly as fast come before other ways of holding parameters, as
    predictions know no caches. `progress` is told what is being looked at and the best step so far.
    Raises InfeasibleError with the nearest candidate and what binds when nothing fits, or nothing
    divides.
    """
    began = time.monotonic()
    ranks = num_ranks or cluster.num_devices
    predict.check_fits(ranks, cluster)
    own = min(cluster.device(rank).memory_bytes for rank in range(ranks))
    limit = float(memory_limit_bytes) if memory_limit_bytes else float("inf")
    limit_s = time_limit_s or _FOR_EVER
    deadline = began + limit_s
    rules = constraints or Constraints()
    outer = None
    if _can_lay_out(subject):
        outer = Outer(
            subject=subject,
            cluster=cluster,
            num_ranks=ranks,
            limit_bytes=limit,
            constraints=rules,
            calibration=calibration,
            deadline=deadline if rules.plans == [] else began + _COMPOSING * limit_s,
            progress=progress,
        )
        outer.run()
        _look_at_smaller(outer)
    extras = Extras(
        subject, cluster, ranks, min(limit, own), rules, calibration, deadline, progress, outer
    )
    others: list[Candidate | Written] = list(extras.run())
    last, changes = _best(outer, extras, min(limit, own), num_finalists, varied=varied)
    best = last[0].candidate
    if outer is not None:
        others += [*outer.frontier.fastest, *outer.frontier.members]
    others = [one for one in {id(one): one for one in others}.values() if one is not best]
    others.sort(key=lambda one: one.step_s)
    members = _members([best, *others])
    considered = [one.alternative() for one in (*others[:1], *members) if one is not best]
    plan = replace(last[0].plan, considered=tuple(dict.fromkeys(considered)))
    return Found(
        plan=plan,
        best=best,
        frontier=members,
        runner_up=others[0] if others else None,
        finalists=(replace(last[0], plan=plan), *last[1:]),
        considered=extras.considered + (outer.trials.considered if outer else 0),
        pruned=outer.pruned if outer else 0,
        seconds=time.monotonic() - began,
        complete=not (extras.stopped or (outer is not None and outer.stopped)),
        binding=_binding(best, min(limit, own), changes),
        changes=changes,
    )


def _can_lay_out(subject: Subject) -> bool:
    """Whether the search can lay out the model: its blocks run once, or several times of which only
    the last has gradients.
    """
    segments = chain.segments(subject.graph)
    paths = [one.path for one in segments if one.path is not None]
    if not paths or len(paths) == len(set(paths)):
        return True
    last = recycling.repeats(segments)
    if last == tuple(range(len(segments))):
        return False
    learns = recycling.learns(subject.graph, len(paths) // len(set(paths)))
    return learns[-1] and not any(learns[:-1])


def _look_at_smaller(outer: Outer) -> None:
    """Look at the best's mesh with smaller microbatches: nearly as fast, they hold less."""
    best = outer.frontier.best
    if best is None:
        return
    for ground in outer.space.grounds():
        if outer.out_of_time():
            return
        if ground.mesh == best.mesh and ground.num_samples < best.num_samples:
            outer.look_at(ground, NEARLY)


def _best(
    outer: Outer | None, extras: Extras, limit: float, count: int, *, varied: bool
) -> tuple[list[Finalist], tuple[Change, ...]]:
    """Return the fastest plans as predicted, the best first. Raises InfeasibleError when there is
    none.
    """
    written = [Finalist(one.plan, one, one.step_s) for one in extras.found]
    if outer is None or outer.frontier.best is None:
        if not written:
            raise _nothing(extras, limit) if outer is None else _infeasible(outer, limit)
        return written, ()
    try:
        last = finalists(outer, limit, count, varied=varied)
    except InfeasibleError:
        if not written:
            raise
        return written, ()
    best = last[0].candidate
    changes = (*_more_memory(outer, best), *_more_bandwidth(outer, best))
    faster = [one for one in written if one.step_s < last[0].predicted_s]
    return [*faster, *last, *written[len(faster) :]], changes


def _members(candidates: Sequence[Candidate | Written]) -> tuple[Candidate | Written, ...]:
    """Those that no other is as fast and as small as, the fastest first."""
    found: list[Candidate | Written] = []
    for one in sorted(candidates, key=lambda one: (one.step_s, one.peak_bytes)):
        if not found or one.peak_bytes < found[-1].peak_bytes:
            found.append(one)
    return tuple(found)


def _more_memory(outer: Outer, best: Candidate | Written) -> tuple[Change, ...]:
    """The grounds of the fastest few again, with more memory on every device."""
    cluster = scaled(outer.cluster, memory=_MORE)
    more = _again(outer, outer.elsewhere(cluster, outer.limit_bytes * _MORE, alike=True))
    return () if more is None else (Change("10% more memory", *_better(more, best)),)


def _more_bandwidth(outer: Outer, best: Candidate | Written) -> tuple[Change, ...]:
    cluster = scaled(outer.cluster, bandwidth=_MORE)
    more = _again(outer, outer.elsewhere(cluster, outer.limit_bytes))
    return () if more is None else (Change("10% more bandwidth", *_better(more, best)),)


def _better(more: Candidate, best: Candidate | Written) -> tuple[float, str]:
    if more.step_s < best.step_s:
        return more.step_s, more.description
    return best.step_s, best.description


def _again(outer: Outer, other: Outer) -> Candidate | None:
    """Look at the grounds of the fastest candidates in another search."""
    grounds = dict.fromkeys(
        Ground(one.mesh, one.num_samples, one.microbatches) for one in outer.frontier.fastest
    )
    for ground in list(grounds)[:_GROUNDS_AGAIN]:
        other.look_at(ground)
    return other.frontier.best


def _binding(best: Candidate | Written, limit: float, changes: tuple[Change, ...]) -> str:
    parts = []
    for change in changes:
        gain = 1 - change.step_s / best.step_s
        if gain > 1e-3:
            parts.append(f"{change.what.removeprefix('10% more ')} (10% more: {gain:.1%} faster)")
    if not parts:
        parts.append("arithmetic")
    full = best.peak_bytes / limit
    return f"{', '.join(parts)}; memory is {full:.0%} full"


def _nothing(extras: Extras, limit: float) -> InfeasibleError:
    """What to say of a model that only the library's plans are for."""
    where = f"{extras.subject.model} on {extras.num_ranks} devices of {extras.cluster.name}"
    if extras.unfit:
        nearest = min(extras.unfit, key=lambda one: one.peak_bytes)
        return InfeasibleError(
            f"no plan of {where} fits {format_bytes(limit)} each; the nearest "
            f"({nearest.description}) needs {format_bytes(nearest.peak_bytes)}",
            remedy="use more devices, a smaller batch, or loosen the constraints",
        )
    reasons = "; ".join(f"{name}: {reason}" for name, reason in extras.refused.items())
    return InfeasibleError(
        f"no plan of {where}, whose blocks run several times: {reasons or 'none is allowed'}",
        remedy="use another batch or number of ranks, or loosen the constraints",
    )


def _infeasible(outer: Outer, limit: float) -> InfeasibleError:
    nearest = outer.trials.nearest
    if nearest is None and outer.stopped:
        return InfeasibleError(
            f"no plan of {outer.subject.model} on {outer.num_ranks} devices of "
            f"{outer.cluster.name} was found in the time given: {outer.trials.considered} were "
            "considered",
            remedy="give the search more time, or narrow it by constraints",
        )
    if nearest is None:
        return InfeasibleError(
            f"no plan of {outer.subject.model} on {outer.num_ranks} devices of "
            f"{outer.cluster.name} was found: no schedule runs these microbatches, no rung runs "
            f"these ways of parameters (a pipeline takes {' and '.join(PIPELINED_WAYS)}), or "
            f"operators gain nothing from the tensor and context axes asked for",
            remedy="loosen the constraints; `runnable = false` also finds what cannot be run",
        )
    candidate = nearest.candidate
    fullest = max(candidate.estimate.memory, key=lambda sizes: sum(sizes.values()))
    category = max(fullest, key=lambda name: fullest[name])
    return InfeasibleError(
        f"no plan of {outer.subject.model} fits {outer.num_ranks} devices of "
        f"{outer.cluster.name} with {format_bytes(limit)} each; the nearest ("
        f"{candidate.description}) needs {format_bytes(candidate.peak_bytes)}, "
        f"{format_bytes(candidate.peak_bytes - limit)} too much; {category} take "
        f"{format_bytes(fullest[category])}",
        remedy="use more devices, a smaller batch or microbatch, or loosen the constraints"
        + (" (offload is one)" if outer.constraints.offload == ["none"] else ""),
    )
