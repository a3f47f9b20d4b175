"""Pipeline parallel, 1F1B: consecutive blocks on each rank, microbatches flowing through them.

mesh        (pipeline p)
placements  none: a stage holds its blocks whole
stages      cut so that the slowest stage is as fast as can be (by the blocks' own work)
order       stage s: p - s forwards, then one backward and one forward in turn, then the rest
"""

from __future__ import annotations

from toolkit.cost import roofline
from toolkit.errors import InfeasibleError
from toolkit.hardware import Cluster
from toolkit.ir import backward, formulas
from toolkit.ir.graph import OpGraph
from toolkit.plan import chain
from toolkit.plan.order import simple
from toolkit.plan.plan import Axis, Plan, Stage
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
) -> Plan:
    """Return the plan over `num_ranks` stages (default: one per device of the cluster).

    Raises InfeasibleError when there are more stages than blocks, or the batch does not divide.
    """
    size = num_ranks or cluster.num_devices
    if size > len(subject.blocks):
        raise InfeasibleError(
            f"{size} pipeline stages do not fit the {len(subject.blocks)} blocks of "
            f"{subject.model}",
            remedy=f"use {len(subject.blocks)} stages or fewer",
        )
    count = microbatches or _default_microbatches(subject, size)
    micro = subject.graph.at(batch=subject.divided(1, count))
    return Plan(
        strategy="1f1b",
        provenance=subject.provenance(cluster),
        mesh=(Axis("pipeline", size),),
        placements=(),
        stages=stages(micro, subject.blocks, size, cluster),
        microbatches=count,
        schedule="1f1b",
        order=simple.one_f_one_b(size, count).rows,
        recompute=subject.blocks if recompute else (),
    )


def stages(
    graph: OpGraph, blocks: tuple[str, ...], num_stages: int, cluster: Cluster
) -> tuple[Stage, ...]:
    """Cut the chain of blocks into stages of balanced time, forward and backward.

    What runs before the first block belongs to it, and what runs after a block belongs to that.
    """
    seconds: list[float] = []
    for segment in chain.segments(graph):
        works = [
            work
            for op in segment.ops
            for work in (formulas.work(op, graph), *backward.work(op, graph))
        ]
        time_s = sum(roofline.seconds(work, cluster.device(0)) for work in works)
        if segment.path is not None and segment.path != blocks[0]:
            seconds.append(time_s)
        elif seconds:
            seconds[-1] += time_s
        else:
            seconds.append(time_s)
    starts = chain.partition(seconds, num_stages)
    ends = (*starts[1:], len(blocks))
    return tuple(
        Stage(blocks[start] if start else None, blocks[start:end], (place,))
        for place, (start, end) in enumerate(zip(starts, ends, strict=True))
    )


def _default_microbatches(subject: Subject, num_stages: int) -> int:
    """The most microbatches up to four a stage that divide the batch."""
    most = min(subject.batch, _MICROBATCHES_PER_STAGE * num_stages)
    return max(count for count in range(1, most + 1) if subject.batch % count == 0)
