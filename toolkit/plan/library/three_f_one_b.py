"""3F1B (SuperScaler, arXiv 2301.08984, section 2): AlphaFold 2's recycling as a pipeline. A sample
goes forward through all stages several times, only the last time with gradients, and back once.

    mesh    (pipeline p, data d)
    stages  the blocks cut in p, once for every pass: pass r of position s is stage r p + s; those
            of passes before the last are without gradients, and keep nothing
    order   `3f1b`: what frees memory first, at most p microbatches kept on any position
"""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.cost import roofline
from toolkit.errors import InfeasibleError
from toolkit.hardware import Cluster
from toolkit.ir import backward, formulas
from toolkit.ir.graph import OpGraph
from toolkit.plan import chain, recycling
from toolkit.plan.order import shared
from toolkit.plan.plan import Axis, Placement, Plan, Stage
from toolkit.plan.subject import Subject

_MICROBATCHES_PER_POSITION = 4


def plan(
    subject: Subject,
    cluster: Cluster,
    *,
    num_ranks: int | None = None,
    microbatches: int | None = None,
    recompute: bool = False,
    data: int = 1,
) -> Plan:
    """Return the plan over `num_ranks` ranks (default: the whole cluster), `data` in each position.

    Raises InfeasibleError for a model that runs its blocks once, or has too few.
    """
    ranks = num_ranks or cluster.num_devices
    if data < 1 or ranks % data:
        raise InfeasibleError(f"{ranks} ranks do not make pipelines with {data} in each position")
    size = ranks // data
    most = min(subject.batch // data, _MICROBATCHES_PER_POSITION * size)
    count = microbatches or max(
        n for n in range(1, max(most, 1) + 1) if (subject.batch // data) % n == 0
    )
    micro = subject.graph.at(batch=subject.divided(data, count))
    passes = recycling.blocks_by_pass(micro)
    if len(passes) < 2:
        raise InfeasibleError(
            f"{subject.model} runs its blocks once", remedy="use a pipeline such as 1f1b"
        )
    blocks = passes[0]
    if size > len(blocks):
        raise InfeasibleError(
            f"{size} positions do not fit the {len(blocks)} blocks of {subject.model}",
            remedy=f"use {len(blocks)} positions or fewer",
        )
    order = shared.three_f_one_b(size, count, num_forwards=len(passes))
    return Plan(
        strategy="3f1b",
        provenance=subject.provenance(cluster),
        mesh=(Axis("pipeline", size), Axis("data", data)),
        placements=tuple(Placement(path, "data", "replicate") for path in (*blocks, "")),
        stages=_stages(micro, passes, size, cluster),
        microbatches=count,
        schedule="3f1b" if len(passes) == 3 else "custom",
        order=order.rows,
        recompute=blocks if recompute else (),
    )


def _stages(
    graph: OpGraph, passes: Sequence[tuple[str, ...]], size: int, cluster: Cluster
) -> tuple[Stage, ...]:
    blocks = passes[0]
    starts = chain.partition(_seconds(graph, blocks, cluster), size)
    learns = recycling.learns(graph, len(passes))
    found = []
    for number, entry in enumerate(recycling.entries(graph, blocks)):
        for position, (start, end) in enumerate(
            zip(starts, (*starts[1:], len(blocks)), strict=True)
        ):
            begins_at = blocks[start] if position else entry
            found.append(Stage(begins_at, blocks[start:end], (position,), not learns[number]))
    return tuple(found)


def _seconds(graph: OpGraph, blocks: Sequence[str], cluster: Cluster) -> list[float]:
    """Forward and backward seconds of each block, all its passes together."""
    found = dict.fromkeys(blocks, 0.0)
    for segment in chain.segments(graph):
        for op in segment.ops if segment.path is not None else ():
            for work in (formulas.work(op, graph), *backward.work(op, graph)):
                found[segment.path or ""] += roofline.seconds(work, cluster.device(0))
    return list(found.values())
