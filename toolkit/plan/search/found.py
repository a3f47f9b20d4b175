"""`search`: from a subject and a cluster to a plan, the frontier, and what would change it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from toolkit.cost.calibration import Calibration
from toolkit.errors import InfeasibleError, UsageError
from toolkit.hardware import Cluster
from toolkit.hardware.scaled import scaled
from toolkit.plan import chain, planner, predict, recycling
from toolkit.plan.library import megatron, sequence_parallel
from toolkit.plan.plan import PIPELINED_WAYS, Placement, Plan
from toolkit.plan.search import write
from toolkit.plan.search.bench import MEGATRON, TOKENS, WHOLE
from toolkit.plan.search.constraints import Constraints
from toolkit.plan.search.extras import Extras, Written
from toolkit.plan.search.frontier import Candidate
from toolkit.plan.search.outer import Outer, Progress
from toolkit.plan.search.space import Ground
from toolkit.plan.subject import Subject
from toolkit.units import format_bytes

# How much more of a resource is asked about.
_MORE = 1.1
# The fastest few are predicted in full and ranked by that.
_FINALISTS = 4
_GROUNDS_AGAIN = 2
# Operators times ranks that are predicted one by one.
_MOST_WRITTEN = 4096
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
    """What a search found. `plan` is predicted; `frontier` and `runner_up` are estimated.

    `considered` candidates were estimated, `pruned` grounds left out because a bound was beaten;
    `complete` is False when time ran out. `binding` says what keeps the plan from being faster.
    """

    plan: Plan
    best: Candidate | Written
    frontier: tuple[Candidate | Written, ...]
    runner_up: Candidate | Written | None
    considered: int
    pruned: int
    seconds: float
    complete: bool
    binding: str
    changes: tuple[Change, ...]


def search(
    subject: Subject,
    cluster: Cluster,
    *,
    num_ranks: int | None = None,
    memory_limit_bytes: float | None = None,
    time_limit_s: float | None = None,
    constraints: Constraints | None = None,
    calibration: Calibration | None = None,
    progress: Progress = lambda _doing, _best_s: None,
) -> Found:
    """Return the best plan found for `subject` on `num_ranks` devices (default: all).

    `progress` is told what is being looked at and the best step so far. Raises InfeasibleError
    with the nearest candidate and what binds when nothing fits, or nothing divides.
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
    extras = Extras(
        subject, cluster, ranks, min(limit, own), rules, calibration, deadline, progress, outer
    )
    others: list[Candidate | Written] = list(extras.run())
    plan, best, changes = _best(outer, extras, min(limit, own))
    if outer is not None:
        others += [*outer.frontier.fastest, *outer.frontier.members]
    others = [one for one in {id(one): one for one in others}.values() if one is not best]
    others.sort(key=lambda one: one.step_s)
    members = _members([best, *others])
    considered = [one.alternative() for one in (*others[:1], *members) if one is not best]
    plan = replace(plan, considered=tuple(dict.fromkeys(considered)))
    return Found(
        plan=plan,
        best=best,
        frontier=members,
        runner_up=others[0] if others else None,
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


def _best(
    outer: Outer | None, extras: Extras, limit: float
) -> tuple[Plan, Candidate | Written, tuple[Change, ...]]:
    """Return the fastest plan as predicted. Raises InfeasibleError when there is none."""
    written = extras.found[0] if extras.found else None
    if outer is None or outer.frontier.best is None:
        if written is None:
            raise _nothing(extras, limit) if outer is None else _infeasible(outer, limit)
        return written.plan, written, ()
    try:
        plan, best = _finalist(outer, limit)
    except InfeasibleError:
        if written is None:
            raise
        return written.plan, written, ()
    changes = (*_more_memory(outer, best), *_more_bandwidth(outer, best))
    assert plan.prediction is not None
    if written is not None and written.step_s < plan.prediction.step_s:
        return written.plan, written, changes
    return plan, best, changes


def _members(candidates: Sequence[Candidate | Written]) -> tuple[Candidate | Written, ...]:
    """Those that no other is as fast and as small as, the fastest first."""
    found: list[Candidate | Written] = []
    for one in sorted(candidates, key=lambda one: (one.step_s, one.peak_bytes)):
        if not found or one.peak_bytes < found[-1].peak_bytes:
            found.append(one)
    return tuple(found)


def written(candidate: Candidate, outer: Outer) -> Plan:
    """Return a candidate's plan, predicted in full; with the search's own estimate where operators
    are split on more ranks than prediction writes out one by one.
    """
    subject, cluster = outer.subject, outer.cluster
    made = write.plan(candidate, outer.outline, subject, cluster, _placed(candidate, subject))
    ranks = candidate.mesh.pipeline * candidate.mesh.inner
    if made.splits and ranks * len(subject.graph.ops) > _MOST_WRITTEN:
        return write.estimated(made, candidate, subject, cluster)
    try:
        return predict.predict(made, subject, cluster, calibration=outer.calibration)
    except UsageError:
        if outer.constraints.runnable:
            raise
        # Nothing runs it, so nothing predicts it rank by rank either.
        return write.estimated(made, candidate, subject, cluster)


def _placed(candidate: Candidate, subject: Subject) -> tuple[Placement, ...] | None:
    """What places modules over the tensor axis; None where operators are split one by one."""
    if candidate.split == WHOLE:
        return ()
    if candidate.split not in (MEGATRON, TOKENS):
        return None
    split = megatron.plan(subject, candidate.stack.cluster, num_ranks=candidate.mesh.tensor)
    tokens = sequence_parallel.placed(subject, split) if candidate.split == TOKENS else ()
    return (*split.placements, *tokens)


def _finalist(outer: Outer, limit: float) -> tuple[Plan, Candidate]:
    """Predict the fastest few in full, and of the others until one fits; return the best that does.

    Where operators are split, a prediction prices one that reads a tensor whole at the shape the
    tensor is made in, a part: there the estimate is heeded, too. Raises InfeasibleError when only
    estimates fit.
    """
    found: list[tuple[float, Plan, Candidate]] = []
    frontier = outer.frontier
    tried = {id(one): one for one in (*frontier.fastest, *frontier.members)}.values()
    for place, candidate in enumerate(tried):
        if place >= _FINALISTS and any(_fits(plan) for _, plan, _ in found):
            break
        plan = written(candidate, outer)
        assert plan.prediction is not None
        plan = replace(plan, prediction=replace(plan.prediction, memory_limit_bytes=int(limit)))
        assert plan.prediction is not None
        step_s = plan.prediction.step_s
        if candidate.split != WHOLE:
            step_s = max(step_s, candidate.step_s)
        found.append((step_s, plan, candidate))
    fitting = [one for one in found if _fits(one[1])]
    if not fitting:
        planner.check_memory(min(found, key=lambda one: _peak_bytes(one[1]))[1])
    _, plan, best = min(fitting, key=lambda one: one[0])
    return plan, best


def _fits(plan: Plan) -> bool:
    return plan.prediction is not None and plan.prediction.fits


def _peak_bytes(plan: Plan) -> int:
    assert plan.prediction is not None
    return plan.prediction.peak_bytes


def _more_memory(outer: Outer, best: Candidate) -> tuple[Change, ...]:
    """The grounds of the fastest few again, with more memory on every device."""
    cluster = scaled(outer.cluster, memory=_MORE)
    more = _again(outer, outer.elsewhere(cluster, outer.limit_bytes * _MORE, alike=True))
    return () if more is None else (Change("10% more memory", *_better(more, best)),)


def _more_bandwidth(outer: Outer, best: Candidate) -> tuple[Change, ...]:
    cluster = scaled(outer.cluster, bandwidth=_MORE)
    more = _again(outer, outer.elsewhere(cluster, outer.limit_bytes))
    return () if more is None else (Change("10% more bandwidth", *_better(more, best)),)


def _better(more: Candidate, best: Candidate) -> tuple[float, str]:
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
