"""Making a plan: one strategy's, or the fastest that fits of all of them.

for each strategy: write its plan -> predict it -> does it fit?  keep the fastest
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from toolkit.cost.calibration import Calibration
from toolkit.errors import InfeasibleError
from toolkit.hardware import Cluster
from toolkit.plan import library, memory, predict
from toolkit.plan.plan import Plan
from toolkit.plan.subject import Subject

AUTO = "auto"


@dataclass(frozen=True)
class Outcome:
    """What became of one strategy: a plan with its prediction, or why there is none."""

    strategy: str
    plan: Plan | None
    reason: str = ""

    @property
    def step_s(self) -> float | None:
        return self.plan.prediction.step_s if self.plan and self.plan.prediction else None


def make(
    subject: Subject,
    cluster: Cluster,
    strategy: str,
    *,
    num_ranks: int | None = None,
    microbatches: int | None = None,
    recompute: bool = False,
    memory_limit_bytes: int | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """Return the plan of one strategy, predicted on `cluster`.

    Raises UsageError for an unknown strategy, and InfeasibleError with the numbers when it cannot
    be made or needs more memory than a device has (or `memory_limit_bytes`, when less).
    """
    predict.check_fits(num_ranks or 1, cluster)
    made = library.find(strategy)(
        subject, cluster, num_ranks=num_ranks, microbatches=microbatches, recompute=recompute
    )
    plan = predict.predict(made, subject, cluster, calibration=calibration)
    assert plan.prediction is not None
    limit = min(plan.prediction.memory_limit_bytes, memory_limit_bytes or 2**63)
    plan = replace(plan, prediction=replace(plan.prediction, memory_limit_bytes=limit))
    _, local, _ = predict.shapes(plan, subject)
    for stage, ledger in enumerate(memory.ledgers(plan, local, cluster)):
        ledger.check(limit, where=f"a rank of stage {stage} under {strategy}")
    return plan


def choose(
    subject: Subject,
    cluster: Cluster,
    *,
    num_ranks: int | None = None,
    microbatches: int | None = None,
    recompute: bool = False,
    memory_limit_bytes: int | None = None,
    calibration: Calibration | None = None,
    progress: Callable[[str], None] = lambda strategy: None,
) -> tuple[Plan, tuple[Outcome, ...]]:
    """Return the plan with the shortest predicted step, and what became of every strategy.

    Raises InfeasibleError with all reasons when none can be made.
    """
    outcomes = []
    for strategy in library.STRATEGIES:
        progress(strategy)
        try:
            plan = make(
                subject, cluster, strategy,
                num_ranks=num_ranks, microbatches=microbatches, recompute=recompute,
                memory_limit_bytes=memory_limit_bytes, calibration=calibration,
            )  # fmt: skip
        except InfeasibleError as error:
            outcomes.append(Outcome(strategy, None, str(error)))
        else:
            outcomes.append(Outcome(strategy, plan))
    plans = [outcome.plan for outcome in outcomes if outcome.plan]
    if not plans:
        reasons = "; ".join(f"{outcome.strategy}: {outcome.reason}" for outcome in outcomes)
        raise InfeasibleError(
            f"no strategy fits {subject.model} on {cluster.name}: {reasons}",
            remedy="use a larger cluster, a smaller batch, or --recompute",
        )
    best = min(plans, key=lambda plan: plan.prediction.step_s if plan.prediction else 0.0)
    return best, tuple(outcomes)
