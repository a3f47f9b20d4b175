"""Data parallel: the batch is split, the model replicated, gradients averaged block by block.

mesh        (data n)
placements  every block and the root: replicate
order       one stage: F B F B ... over the microbatches; reductions overlap the last B
"""

from __future__ import annotations

from toolkit.hardware import Cluster
from toolkit.plan.order.simple import one_f_one_b
from toolkit.plan.plan import Axis, Placement, Plan, Stage
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
    size = num_ranks or cluster.num_devices
    count = microbatches or 1
    subject.divided(size, count)
    return Plan(
        strategy="dp",
        provenance=subject.provenance(cluster),
        mesh=(Axis("data", size),),
        placements=tuple(Placement(path, "data", "replicate") for path in (*subject.blocks, "")),
        stages=(Stage(None, subject.blocks),),
        microbatches=count,
        schedule="1f1b",
        order=one_f_one_b(1, count).rows,
        recompute=subject.blocks if recompute else (),
    )
