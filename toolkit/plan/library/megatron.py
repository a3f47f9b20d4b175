"""Tensor parallel after Megatron-LM: the Linears of each block split by columns, then by rows.

    mesh        (tensor n)
    placements  Linears that begin a split region: column; the Linear that ends it: row
    order       one stage: F B F B ... over the microbatches; all-reduces lie inside F and B

Which Linears those are is read off the graph (transform.py); embeddings and the head stay whole.
"""

from __future__ import annotations

from toolkit.hardware import Cluster
from toolkit.plan import chain, transform
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

    Raises InfeasibleError when the degree does not divide heads or features, saying which do.
    """
    size = num_ranks or cluster.num_devices
    count = microbatches or 1
    subject.divided(1, count)
    placements: list[Placement] = []
    for region in transform.regions(subject.graph, chain.segments(subject.graph), size):
        placements += [Placement(path, "tensor", "column") for path in region.columns]
        placements.append(Placement(region.row, "tensor", "row"))
    return Plan(
        strategy="tp",
        provenance=subject.provenance(cluster),
        mesh=(Axis("tensor", size),),
        placements=tuple(placements),
        stages=(Stage(None, subject.blocks),),
        microbatches=count,
        schedule="1f1b",
        order=one_f_one_b(1, count).rows,
        recompute=subject.blocks if recompute else (),
    )
