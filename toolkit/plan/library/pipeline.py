"""What the pipeline plans share: stages cut by time, a table of actions, and data parallelism
over it.

    mesh        (pipeline p, data n): n replicas, each a pipeline; (pipeline p) where n is 1
    placements  with data, every block and the root: replicate, or shard_optimizer (ZeRO-1)
    stages      cut so that the slowest stage is as fast as can be (by the blocks' own work)
    order       one of order/families.py, or one that a search found ("custom")

A schedule decides how many stages a position has and which: `1f1b` one, `interleaved` two, p apart,
`zb-v` and `dualpipe-v` two, down the positions and back up.
"""

from __future__ import annotations

from collections.abc import Callable

from toolkit.cost import roofline
from toolkit.errors import InfeasibleError, UsageError
from toolkit.hardware import Cluster
from toolkit.ir import backward, formulas
from toolkit.ir.graph import OpGraph
from toolkit.plan import chain
from toolkit.plan.order import families
from toolkit.plan.order.pipeline import Order
from toolkit.plan.plan import Axis, How, Placement, Plan, Stage
from toolkit.plan.subject import Subject

CUSTOM = "custom"
# Microbatches a position, when none are asked for: the bubble of 1F1B is then about a fifth.
_MICROBATCHES_PER_POSITION = 4


def write(
    subject: Subject,
    cluster: Cluster,
    schedule: str,
    *,
    num_ranks: int | None = None,
    microbatches: int | None = None,
    recompute: bool = False,
    data: int = 1,
    how: How = "replicate",
) -> Plan:
    """Return the plan of `schedule` over `num_ranks` ranks (default: the whole cluster), `data` of
    them in each position, over which parameters lie as `how`: "replicate" or "shard_optimizer".

    Raises InfeasibleError when there are more stages than blocks, ranks or batch do not divide, or
    the schedule cannot run that many microbatches.
    """
    ranks = num_ranks or cluster.num_devices
    if data < 1 or ranks % data:
        raise InfeasibleError(
            f"{ranks} ranks do not make pipelines with {data} ranks in each position",
            remedy=f"use a data degree that divides {ranks}",
        )
    size = ranks // data
    build = _builder(schedule, size)
    count = microbatches or _default_microbatches(build, subject.batch // data, size)
    try:
        order = build(count)
    except UsageError as error:
        raise InfeasibleError(error.message, remedy=error.remedy) from error
    return follow(
        subject, cluster, order, schedule,
        strategy=schedule, data=data, recompute=recompute, how=how,
    )  # fmt: skip


def follow(
    subject: Subject,
    cluster: Cluster,
    order: Order,
    schedule: str = CUSTOM,
    *,
    strategy: str = "pipeline",
    data: int = 1,
    recompute: bool = False,
    how: How = "replicate",
) -> Plan:
    """Return the plan that runs `order`, such as one that a search found: a stage for each of its
    placements.

    Raises InfeasibleError when there are more stages than blocks or the batch does not divide.
    """
    num_stages = len(order.placement)
    if num_stages > len(subject.blocks):
        raise InfeasibleError(
            f"{num_stages} pipeline stages do not fit the {len(subject.blocks)} blocks of "
            f"{subject.model}",
            remedy=f"use a schedule with {len(subject.blocks)} stages or fewer",
        )
    micro = subject.graph.at(batch=subject.divided(data, order.num_microbatches))
    mesh = (Axis("pipeline", order.num_devices), Axis("data", data))
    units = (*subject.blocks, "") if data > 1 else ()
    return Plan(
        strategy=strategy,
        provenance=subject.provenance(cluster),
        mesh=mesh if data > 1 else mesh[:1],
        placements=tuple(Placement(path, "data", how) for path in units),
        stages=stages(micro, subject.blocks, order.placement, cluster),
        microbatches=order.num_microbatches,
        schedule=schedule,
        order=order.rows,
        recompute=subject.blocks if recompute else (),
    )


def stages(
    graph: OpGraph,
    blocks: tuple[str, ...],
    placement: tuple[tuple[int, ...], ...],
    cluster: Cluster,
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
    starts = chain.partition(seconds, len(placement))
    ends = (*starts[1:], len(blocks))
    return tuple(
        Stage(blocks[start] if start else None, blocks[start:end], devices)
        for devices, start, end in zip(placement, starts, ends, strict=True)
    )


def _builder(schedule: str, num_devices: int) -> Callable[[int], Order]:
    return lambda count: families.build(schedule, num_devices, count)


def _default_microbatches(build: Callable[[int], Order], batch: int, num_positions: int) -> int:
    """The most microbatches up to four a position that divide the batch and that the schedule can
    run; where it can run none of them, what it says of one is raised.
    """
    most = min(batch, _MICROBATCHES_PER_POSITION * num_positions)
    divisors = [count for count in range(most, 0, -1) if batch % count == 0]
    for count in divisors:
        try:
            build(count)
        except UsageError:
            continue
        return count
    return divisors[0]
