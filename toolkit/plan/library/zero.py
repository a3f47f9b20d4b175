"""ZeRO-1 and ZeRO-2: as data parallel, but each rank updates 1/n of every parameter.

mesh        (data n)
placements  every block and the root: shard_optimizer (ZeRO-1), or shard_gradients (ZeRO-2), where
            each rank also keeps 1/n of the gradients alone
order       one stage: F B F B ...; gradients are reduce-scattered in the last B (ZeRO-1) or in
            each (ZeRO-2), and updated parameters gathered after the optimizer's step
"""

from __future__ import annotations

from dataclasses import replace

from toolkit.hardware import Cluster
from toolkit.plan.library import data_parallel
from toolkit.plan.plan import How, Plan
from toolkit.plan.subject import Subject


def plan_1(
    subject: Subject,
    cluster: Cluster,
    *,
    num_ranks: int | None = None,
    microbatches: int | None = None,
    recompute: bool = False,
) -> Plan:
    """Return the ZeRO-1 plan over `num_ranks` ranks (default: the whole cluster).

    Raises InfeasibleError when the batch does not divide.
    """
    replicated = data_parallel.plan(
        subject, cluster, num_ranks=num_ranks, microbatches=microbatches, recompute=recompute
    )
    return _placed(replicated, "zero-1", "shard_optimizer")


def plan_2(
    subject: Subject,
    cluster: Cluster,
    *,
    num_ranks: int | None = None,
    microbatches: int | None = None,
    recompute: bool = False,
) -> Plan:
    """Return the ZeRO-2 plan, as `plan_1` does."""
    replicated = data_parallel.plan(
        subject, cluster, num_ranks=num_ranks, microbatches=microbatches, recompute=recompute
    )
    return _placed(replicated, "zero-2", "shard_gradients")


def _placed(replicated: Plan, strategy: str, how: How) -> Plan:
    placements = tuple(replace(placement, how=how) for placement in replicated.placements)
    return replace(replicated, strategy=strategy, placements=placements)
