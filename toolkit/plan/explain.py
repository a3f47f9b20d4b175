"""Why a plan is what it is: where its step goes, what binds, what was next best, what would help.

Everything here is predicted, by simulating the plan again on its cluster and on better ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from toolkit.cost.calibration import Calibration
from toolkit.errors import FormatError
from toolkit.hardware import Cluster
from toolkit.hardware.scaled import scaled
from toolkit.plan import predict
from toolkit.plan.plan import Alternative, Plan, Prediction
from toolkit.plan.predict.costs import Costs
from toolkit.plan.predict.simulate import Run
from toolkit.plan.subject import Subject
from toolkit.units import format_bytes, format_seconds

# How much better hardware is asked for.
_MORE = 1.1
# What the step takes the most of binds it; a resource below this share of the step does not.
_FULL = 0.9


@dataclass(frozen=True)
class Spent:
    """Where the step of a rank at `position` goes; the three parts add up to the step.

    `waiting_s` is neither: bubble of the pipeline, and communication of others.
    """

    position: int
    compute_s: float
    exposed_s: float  # communicating, or waiting for the host, while nothing is computed
    waiting_s: float


@dataclass(frozen=True)
class Change:
    """What 10 % more of `what` would change: the step of this plan, and what would be faster."""

    what: str
    step_s: float
    instead: str = ""


@dataclass(frozen=True)
class Explanation:
    """`binding` names what the plan is limited by; `runner_up` is the best that fits beside it.
    `offload` says what is on the host and what that takes; "" where nothing is.
    """

    prediction: Prediction
    spent: tuple[Spent, ...]
    binding: str
    runner_up: Alternative | None
    fastest_unfit: Alternative | None
    changes: tuple[Change, ...]
    offload: str = ""


def explain(
    plan: Plan, subject: Subject, cluster: Cluster, *, calibration: Calibration | None = None
) -> Explanation:
    """Return why `plan` is as it is on `cluster`.

    Raises FormatError for a plan without a prediction, InfeasibleError when the cluster is too
    small.
    """
    if plan.prediction is None:
        raise FormatError(
            "the plan holds no prediction to explain", remedy="make it with `toolkit plan make`"
        )
    limit = plan.prediction.memory_limit_bytes
    again = predict.predict(plan, subject, cluster, calibration=calibration).prediction
    assert again is not None
    here = replace(again, memory_limit_bytes=limit)
    run = predict.simulated(plan, subject, cluster, calibration=calibration)
    spent = spending(run)
    others = [other for other in plan.considered if other.step_s is not None]
    fits = [other for other in others if not other.reason]
    unfit = [
        other
        for other in others
        if other.reason and other.step_s is not None and other.step_s < here.step_s
    ]
    runner_up = min(fits, key=_step, default=None)
    changes = []
    for what, better in (
        ("compute", scaled(cluster, compute=_MORE)),
        ("bandwidth", scaled(cluster, bandwidth=_MORE)),
    ):
        found = predict.simulated(plan, subject, better, calibration=calibration)
        changes.append(Change(f"{_MORE - 1:.0%} more {what}", found.step_s))
    changes.append(_more_memory(here, unfit))
    return Explanation(
        prediction=here,
        spent=spent,
        binding=_binding(here, spent, unfit),
        runner_up=runner_up,
        fastest_unfit=min(unfit, key=_step, default=None),
        changes=tuple(changes),
        offload=_offload(plan, here, run, cluster),
    )


def spending(run: Run) -> tuple[Spent, ...]:
    """Return where the simulated step goes, rank by rank."""
    found = []
    for rank in sorted({task.rank for task, _, _ in run.tasks}):
        busy: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        inside_s = 0.0  # communication that a computing task waits for
        for task, start_s, end_s in run.tasks:
            if task.rank == rank and end_s > start_s:
                busy[task.stream == "compute"].append((start_s, end_s))
                inside_s += task.waiting_s
        compute_s = _covered(busy[True])
        either_s = _covered(busy[True] + busy[False])
        exposed_s = either_s - compute_s + inside_s
        found.append(Spent(rank, compute_s - inside_s, exposed_s, run.step_s - either_s))
    return tuple(found)


def _offload(plan: Plan, here: Prediction, run: Run, cluster: Cluster) -> str:
    """What is on the host, what it takes there, and whose figures these are."""
    if plan.offload == "none":
        return ""
    if not here.host_bytes:
        return f"{plan.offload} on the host, which is the device: nothing is saved"
    first = min(task.rank for task, _, _ in run.tasks)
    copies_s, updates_s = (
        sum(task.seconds for task, _, _ in run.tasks if (task.rank, task.stream) in wanted)
        for wanted in ({(first, "down"), (first, "up")}, {(first, "host")})
    )
    host = Costs(plan, cluster).host(0)
    return (
        f"{plan.offload} on the host: {format_bytes(here.host_peak_bytes)} of "
        f"{format_bytes(here.host_limit_bytes)} a device; copies take {format_seconds(copies_s)} "
        f"and the update there {format_seconds(updates_s)}, predicted ({host.name}: {host.source})"
    )


def _covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of spans."""
    total_s, reached_s = 0.0, 0.0
    for start_s, end_s in sorted(spans):
        total_s += max(0.0, end_s - max(start_s, reached_s))
        reached_s = max(reached_s, end_s)
    return total_s


def _step(other: Alternative) -> float:
    assert other.step_s is not None
    return other.step_s


def _binding(here: Prediction, spent: tuple[Spent, ...], unfit: list[Alternative]) -> str:
    slowest = max(spent, key=lambda one: one.compute_s + one.exposed_s)
    parts = {
        "arithmetic": slowest.compute_s,
        "communication": slowest.exposed_s,
        "waiting in the pipeline": slowest.waiting_s,
    }
    what = max(parts, key=lambda name: parts[name])
    share = parts[what] / here.step_s if here.step_s else 0.0
    text = f"{what}: {share:.0%} of the step of position {slowest.position}, the busiest"
    if unfit:
        which = "a faster plan needs" if len(unfit) == 1 else f"{len(unfit)} faster plans need"
        text = f"memory: {which} more than a device has; then {text}"
    elif here.peak_bytes > _FULL * here.memory_limit_bytes:
        text = f"memory is nearly full; then {text}"
    return text


def _more_memory(here: Prediction, unfit: list[Alternative]) -> Change:
    limit = here.memory_limit_bytes * _MORE
    now_fit = [other for other in unfit if other.peak_bytes and other.peak_bytes <= limit]
    best = min(now_fit, key=_step, default=None)
    name = f"{_MORE - 1:.0%} more memory"
    return Change(name, _step(best), best.description) if best else Change(name, here.step_s)
