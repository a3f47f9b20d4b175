"""Making a plan: one strategy's, or the fastest that fits of all of them.

for each strategy: write its plan -> predict it -> does it fit?  keep the fastest
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from toolkit.cost.calibration import Calibration
from toolkit.cost.memory import Ledger
from toolkit.errors import InfeasibleError, unknown_name
from toolkit.hardware import Cluster
from toolkit.plan import check, library, own, predict
from toolkit.plan.plan import Alternative, Offload, Plan
from toolkit.plan.subject import Subject
from toolkit.units import format_bytes

AUTO = "auto"
# What every strategy takes.
_COMMON = {"subject", "cluster", "num_ranks", "microbatches", "recompute"}


def make(
    subject: Subject,
    cluster: Cluster,
    strategy: str,
    *,
    num_ranks: int | None = None,
    microbatches: int | None = None,
    recompute: bool = False,
    offload: Offload = "none",
    memory_limit_bytes: int | None = None,
    calibration: Calibration | None = None,
    **degrees: int | None,
) -> Plan:
    """Return the plan of one strategy, predicted on `cluster`.

    `degrees` are what only some strategies take (`data=2` beside a pipeline). Raises UsageError
    for an unknown strategy, and InfeasibleError with the numbers when it cannot be made, no rung
    runs it with this `offload`, or it needs more memory than a device has (or
    `memory_limit_bytes`, when less).
    """
    predict.check_fits(num_ranks or 1, cluster)
    write = library.find(strategy)
    known = {*inspect.signature(write).parameters} - _COMMON
    for name in degrees:
        if name not in known:
            raise unknown_name(f"degree of {strategy}", name, known)
    options: dict[str, Any] = {
        "num_ranks": num_ranks,
        "microbatches": microbatches,
        "recompute": recompute,
        **{name: degree for name, degree in degrees.items() if degree is not None},
    }
    plan = _predicted(
        offloaded(write(subject, cluster, **options), offload),
        subject,
        cluster,
        memory_limit_bytes,
        calibration,
    )
    check_memory(plan)
    return plan


def make_own(
    subject: Subject,
    cluster: Cluster,
    write: own.Write,
    *,
    microbatches: int | None = None,
    recompute: bool = False,
    offload: Offload = "none",
    memory_limit_bytes: int | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """Return the plan that `write` makes of a Program with the three primitives, predicted.

    Raises UsageError for a program that cannot run or that no plan says (see own.plan), and
    InfeasibleError when it needs more memory than a device has.
    """
    made = own.plan(write, subject, cluster, microbatches=microbatches or 1, recompute=recompute)
    made = offloaded(made, offload)
    predict.check_fits(made.num_ranks, cluster)
    plan = _predicted(made, subject, cluster, memory_limit_bytes, calibration)
    check_memory(plan)
    return plan


def choose(
    subject: Subject,
    cluster: Cluster,
    *,
    num_ranks: int | None = None,
    microbatches: int | None = None,
    recompute: bool = False,
    offload: Offload = "none",
    memory_limit_bytes: int | None = None,
    calibration: Calibration | None = None,
    progress: Callable[[str], None] = lambda strategy: None,
) -> Plan:
    """Return the library's plan with the shortest predicted step; it names all the others.

    Raises InfeasibleError with all reasons when none can be made.
    """
    predict.check_fits(num_ranks or 1, cluster)
    plans: list[Plan] = []
    others: list[Alternative] = []
    for strategy, write in library.STRATEGIES.items():
        progress(strategy)
        try:
            made = write(
                subject, cluster,
                num_ranks=num_ranks, microbatches=microbatches, recompute=recompute,
            )  # fmt: skip
            made = offloaded(made, offload)
            plan = _predicted(made, subject, cluster, memory_limit_bytes, calibration)
        except InfeasibleError as error:
            others.append(Alternative(strategy, None, None, str(error)))
            continue
        try:
            check_memory(plan)
        except InfeasibleError as error:
            others.append(as_alternative(plan, str(error)))
        else:
            plans.append(plan)
    if not plans:
        reasons = "; ".join(f"{other.description}: {other.reason}" for other in others)
        raise InfeasibleError(
            f"no strategy fits {subject.model} on {cluster.name}: {reasons}",
            remedy="use a larger cluster, a smaller batch, --recompute or --offload",
        )
    plans.sort(key=lambda plan: plan.prediction.step_s if plan.prediction else 0.0)
    best, *slower = plans
    return replace(best, considered=(*map(as_alternative, slower), *others))


def offloaded(plan: Plan, offload: Offload) -> Plan:
    """Return the plan with what `offload` names on the host; InfeasibleError if no rung runs it."""
    plan = replace(plan, offload=offload)
    fault = check.offload_fault(plan)
    if fault is not None:
        raise InfeasibleError(fault[0], remedy=fault[1])
    return plan


def as_alternative(plan: Plan, reason: str = "") -> Alternative:
    """Return a predicted plan as what was considered beside another."""
    assert plan.prediction is not None
    return Alternative(plan.strategy, plan.prediction.step_s, plan.prediction.peak_bytes, reason)


def check_memory(plan: Plan) -> None:
    """Raise InfeasibleError with the numbers when a rank holds more than its limit."""
    assert plan.prediction is not None
    for position, entries in enumerate(plan.prediction.memory_bytes):
        ledger = Ledger()
        for name, num_bytes in entries.items():
            ledger = ledger.add(name, name, num_bytes)  # type: ignore[arg-type]
        where = f"a rank at position {position} under {plan.strategy}"
        ledger.check(plan.prediction.memory_limit_bytes, where=where)
    kept, limit = plan.prediction.host_peak_bytes, plan.prediction.host_limit_bytes
    if kept > limit:
        raise InfeasibleError(
            f"a rank under {plan.strategy} keeps {format_bytes(kept)} on the host, whose part for "
            f"each device is {format_bytes(limit)}",
            remedy="shard more (zero-1, fsdp), use more machines, or offload less",
        )


def _predicted(
    plan: Plan,
    subject: Subject,
    cluster: Cluster,
    memory_limit_bytes: int | None,
    calibration: Calibration | None,
) -> Plan:
    found = predict.predict(plan, subject, cluster, calibration=calibration)
    assert found.prediction is not None
    limit = min(found.prediction.memory_limit_bytes, memory_limit_bytes or 2**63)
    return replace(found, prediction=replace(found.prediction, memory_limit_bytes=limit))
