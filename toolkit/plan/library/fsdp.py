"""Fully sharded data parallel (FSDP2, ZeRO-3): each rank keeps 1/n of every parameter.

mesh        (data n)
placements  every block and the root: shard; a block is gathered to run and freed after
order       one stage: F B F B ... over the microbatches; gradients are scattered in the last B
"""

from __future__ import annotations

from dataclasses import replace

from toolkit.hardware import Cluster
from toolkit.plan.library import data_parallel
from toolkit.plan.plan import Plan
from toolkit.plan.subject import Subject


def plan(
    subject: Subject,
    cluster: Cluster,
    *,
    num_ranks: int | None = None,
    microbatches: int | None = None,
    recompute: bool = False,
) -> Plan:
    """Return the plan over `num_ranks` ranks (default: the whole cluster).

    Raises InfeasibleError when the batch does not divide.
    """
    replicated = data_parallel.plan(
        subject, cluster, num_ranks=num_ranks, microbatches=microbatches, recompute=recompute
    )
    placements = tuple(replace(placement, how="shard") for placement in replicated.placements)
    return replace(replicated, strategy="fsdp", placements=placements)
