"""Any grid: pipeline x data x context x tensor, the tensor axis split as Megatron-LM does.

mesh        (pipeline p, data d, context c, tensor t)
placements  Linears that begin a split region: column, and that end it: row; with `sequence`,
            blocks: tokens of what lies between regions are split too; data: units replicated
splits      context: tokens of every operator (context_parallel.py)
order       1F1B (accumulation when there is one stage); all-reduces lie inside F and B
"""

from __future__ import annotations

from toolkit.errors import InfeasibleError
from toolkit.hardware import Cluster
from toolkit.ir.graph import OpGraph
from toolkit.plan.library import context_parallel
from toolkit.plan.library.pipeline import stages
from toolkit.plan.order import simple
from toolkit.plan.plan import Axis, Placement, Plan, Split
from toolkit.plan.program import pattern, regions
from toolkit.plan.subject import Subject

# Microbatches a stage, when none are asked for: the bubble is then about a fifth.
_MICROBATCHES_PER_STAGE = 4


def plan(
    subject: Subject,
    cluster: Cluster,
    *,
    num_ranks: int | None = None,
    microbatches: int | None = None,
    recompute: bool = False,
    pipeline: int | None = None,
    context: int | None = None,
    tensor: int | None = None,
    sequence: bool = False,
) -> Plan:
    """Return the plan over `num_ranks` ranks (default: the whole cluster); data parallelism takes
    those that the other degrees leave. Degrees not given are 1; with none given, pipeline and
    tensor are 2.

    Raises InfeasibleError when a degree does not divide what it splits.
    """
    size = num_ranks or cluster.num_devices
    default = 2 if pipeline is context is tensor is None else 1
    pipeline, tensor, context = pipeline or default, tensor or default, context or 1
    product = pipeline * context * tensor
    if size % product:
        raise InfeasibleError(
            f"pipeline {pipeline} x context {context} x tensor {tensor} does not divide {size} "
            f"ranks",
            remedy=f"use a multiple of {product} ranks, or other degrees",
        )
    if pipeline > len(subject.blocks):
        raise InfeasibleError(
            f"{pipeline} stages do not fit the {len(subject.blocks)} blocks of {subject.model}",
            remedy=f"use {len(subject.blocks)} stages or fewer",
        )
    data = size // product
    count = microbatches or _default_microbatches(subject, pipeline, data)
    micro = subject.graph.at(batch=subject.divided(data, count))
    order = simple.one_f_one_b(pipeline, count)
    return Plan(
        strategy="grid",
        provenance=subject.provenance(cluster),
        mesh=(
            Axis("pipeline", pipeline),
            Axis("data", data),
            Axis("context", context),
            Axis("tensor", tensor),
        ),
        placements=(
            *(Placement(path, "tensor", "sequence") for path in subject.blocks if sequence),
            *(Placement(path, "data", "replicate") for path in (*subject.blocks, "")),
        ),
        splits=(*tensor_splits(micro, tensor), *context_parallel.splits(micro, context)),
        stages=stages(micro, subject.blocks, order.placement, cluster),
        microbatches=count,
        schedule="1f1b",
        order=order.rows,
        recompute=subject.blocks if recompute else (),
    )


def tensor_splits(graph: OpGraph, degree: int) -> tuple[Split, ...]:
    """Return the splits of a microbatch's graph over the tensor axis: in every block the linears
    that read one tensor by columns, and what follows up to the rows that sum over them.
    """
    if degree == 1:
        return ()
    return pattern.splits(graph, regions.dims(graph, degree, "a tensor degree of"), "tensor")


def _default_microbatches(subject: Subject, num_stages: int, num_replicas: int) -> int:
    """The most microbatches up to four a stage that divide a replica's batch."""
    batch = max(1, subject.batch // num_replicas)
    most = min(batch, _MICROBATCHES_PER_STAGE * num_stages) if num_stages > 1 else 1
    return max(count for count in range(1, most + 1) if batch % count == 0)
