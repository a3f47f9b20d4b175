"""The interlaced pipeline (SuperScaler, arXiv 2301.08984, section 2): a very large embedding is
split by vocabulary over all devices, and its steps run in between a 1F1B of the layers.

    mesh    (pipeline p, data d)
    stages  what reads the vocabulary (embeddings, head, loss) on all positions together; the layers
            between, cut so that the slowest stage is as fast as can be, one stage a position
    splits  rows of the table in embeddings, and the head's outputs: over the pipeline axis; the
            loss by samples where they divide
    order   embedding, layers, head: `interlaced`; with a second embedding (a decoder's) between: a
            list schedule, at most p microbatches alive in a stage

No stage holds the whole table, and none is overloaded by it. All positions run the shared stages in
the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.cost import roofline
from toolkit.errors import InfeasibleError
from toolkit.hardware import Cluster
from toolkit.ir import backward, formulas
from toolkit.ir.graph import Op, OpGraph
from toolkit.plan import chain
from toolkit.plan.order import greedy, shared
from toolkit.plan.order.pipeline import Order
from toolkit.plan.order.pipeline import Stage as Cost
from toolkit.plan.order.pipeline import chain as problem_of
from toolkit.plan.plan import Axis, Placement, Plan, Split, Stage
from toolkit.plan.program import rules, select
from toolkit.plan.subject import Subject

_MICROBATCHES_PER_POSITION = 4
# Tables smaller than this may stay whole where they do not divide.
_SMALL = 4096


@dataclass(frozen=True)
class _Stretch:
    """Operators between two cuts: of the vocabulary, or layers with their blocks."""

    begins_at: str | None
    ops: tuple[Op, ...]
    blocks: tuple[str, ...]


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

    Raises InfeasibleError for a model without a vocabulary, or one that does not divide.
    """
    ranks = num_ranks or cluster.num_devices
    if data < 1 or ranks % data:
        raise InfeasibleError(f"{ranks} ranks do not make pipelines with {data} in each position")
    size = ranks // data
    count = microbatches or _default_microbatches(subject.batch // data, size)
    micro = subject.graph.at(batch=subject.divided(data, count))
    stretches = _stretches(micro, subject.blocks)
    stages = _stages(micro, stretches, size, cluster)
    order = _order(stages, size, count)
    return Plan(
        strategy="interlaced",
        provenance=subject.provenance(cluster),
        mesh=(Axis("pipeline", size), Axis("data", data)),
        placements=tuple(Placement(path, "data", "replicate") for path in (*subject.blocks, "")),
        splits=_splits(micro, stretches, size),
        stages=stages,
        microbatches=count,
        schedule=order.name if order.name == "interlaced" else "custom",
        order=order.rows,
        recompute=subject.blocks if recompute else (),
    )


def _default_microbatches(batch: int, num_positions: int) -> int:
    most = min(batch, _MICROBATCHES_PER_POSITION * num_positions)
    return max(count for count in range(1, most + 1) if batch % count == 0)


def _tables(graph: OpGraph, blocks: Sequence[str]) -> tuple[list[Op], list[Op]]:
    """The embeddings of the largest vocabulary outside the blocks, and the linears onto it."""

    def outside(op: Op) -> bool:
        return not any(f"{op.module_path}.".startswith(f"{path}.") for path in blocks)

    looked_up = [op for op in graph.ops if op.kind == "aten.embedding" and outside(op)]
    learned = [op for op in looked_up if graph.tensors[op.inputs[0]].role == "parameter"]
    rows = max((graph.tensors[op.inputs[0]].shape[0] for op in learned), default=0)
    embeddings = [op for op in learned if graph.tensors[op.inputs[0]].shape[0] == rows]
    heads = [
        op
        for op in graph.ops
        if op.kind == "aten.linear" and outside(op) and graph.tensors[op.inputs[1]].shape[0] == rows
    ]
    if not embeddings or len(heads) != 1:
        raise InfeasibleError(
            f"{graph.name} has no vocabulary that an embedding and a head share",
            remedy="use a pipeline of its layers (1f1b), or co-shard",
        )
    return embeddings, heads


def _stretches(graph: OpGraph, blocks: tuple[str, ...]) -> tuple[_Stretch, ...]:
    """Cut at the embeddings and the head: vocabulary, layers, vocabulary, ..., vocabulary."""
    embeddings, heads = _tables(graph, blocks)
    vocabulary = {op.name for op in embeddings}
    segments = chain.segments(graph)
    first = next(i for i, segment in enumerate(segments) if segment.path is not None)
    # What comes before the first block belongs to the embedding unless a module of layers began.
    runs: list[tuple[bool, list[Op]]] = [(True, [])]
    seen_head = False
    before_blocks = {op.name for segment in segments[:first] for op in segment.ops}
    nested = "." in blocks[0].rpartition(".")[0]  # encoder.blocks.0: layers have a module
    for op in graph.ops:
        seen_head = seen_head or op.name == heads[0].name
        plain = op.name in before_blocks and not nested
        is_shared = op.name in vocabulary or seen_head or plain
        if is_shared != runs[-1][0]:
            runs.append((is_shared, []))
        runs[-1][1].append(op)
    found = []
    for number, (_, ops) in enumerate(runs):
        inside = {op.module_path for op in ops}
        held = tuple(
            path for path in blocks if any(f"{one}.".startswith(f"{path}.") for one in inside)
        )
        found.append(_Stretch(_entry(graph, ops[0], held) if number else None, tuple(ops), held))
    return tuple(found)


def _entry(graph: OpGraph, op: Op, blocks: tuple[str, ...]) -> str:
    """The path at which a stretch is entered by its first operator."""
    place = graph.ops.index(op)
    before = graph.ops[place - 1].module_path
    path = op.module_path
    while "." in path and not f"{before}.".startswith(f"{path.rpartition('.')[0]}."):
        path = path.rpartition(".")[0]
    return path


def _stages(
    graph: OpGraph, stretches: Sequence[_Stretch], size: int, cluster: Cluster
) -> tuple[Stage, ...]:
    layers = [one for one in stretches if one.blocks]
    if size < len(layers) and size > 1:
        raise InfeasibleError(
            f"{len(layers)} stacks of layers do not fit {size} positions",
            remedy=f"use {len(layers)} positions or more",
        )
    seconds = [_block_seconds(graph, one, cluster) for one in layers]
    shares = _shares(seconds, size)
    everyone = tuple(range(size))
    found: list[Stage] = []
    position = 0
    for one in stretches:
        if not one.blocks:
            found.append(Stage(one.begins_at, (), everyone))
            continue
        share = shares[layers.index(one)]
        starts = chain.partition(seconds[layers.index(one)], share)
        for start, end in zip(starts, (*starts[1:], len(one.blocks)), strict=True):
            begins_at = one.blocks[start] if start else one.begins_at
            found.append(Stage(begins_at, one.blocks[start:end], (position % size,)))
            position += 1
    return tuple(found)


def _block_seconds(graph: OpGraph, stretch: _Stretch, cluster: Cluster) -> list[float]:
    """Forward and backward seconds of each block of a stretch; what is around counts to it."""
    found = [0.0] * len(stretch.blocks)
    at = 0
    for op in stretch.ops:
        for index, path in enumerate(stretch.blocks):
            if f"{op.module_path}.".startswith(f"{path}."):
                at = index
        for work in (formulas.work(op, graph), *backward.work(op, graph)):
            found[at] += roofline.seconds(work, cluster.device(0))
    return found


def _shares(seconds: Sequence[Sequence[float]], size: int) -> list[int]:
    """How many positions each stack of layers gets: as many as its time is of the whole."""
    shares = [1] * len(seconds)
    for _ in range(size - sum(shares)):
        loads = [
            sum(some) / share if share < len(some) else 0.0
            for some, share in zip(seconds, shares, strict=True)
        ]
        if not any(loads):
            total = sum(len(some) for some in seconds)
            raise InfeasibleError(
                f"{size} positions are more than the {total} blocks", remedy=f"use {total} or fewer"
            )
        shares[loads.index(max(loads))] += 1
    return shares


def _splits(graph: OpGraph, stretches: Sequence[_Stretch], size: int) -> tuple[Split, ...]:
    """Split tables by rows and the head by its outputs, and by samples what comes after it."""
    if size == 1:
        return ()
    annotations = {op.name: rules.annotation(op, graph) for op in graph.ops}
    found: dict[str, str] = {}
    for stretch in stretches:
        for op in stretch.ops if not stretch.blocks else ():
            table = graph.tensors[op.inputs[0]] if op.kind == "aten.embedding" else None
            if table is not None and table.role == "parameter":
                if table.shape[0] % size == 0:
                    found[op.name] = annotations[op.name].inputs[0][0][0]
                elif table.shape[0] >= _SMALL:
                    raise _uneven(table.shape[0], op.name, size)
            elif op.kind == "aten.linear":
                if annotations[op.name].sizes["n"] % size:
                    raise _uneven(annotations[op.name].sizes["n"], op.name, size)
                found[op.name] = "n"
    heads = [name for name in found if graph.op(name).kind == "aten.linear"]
    samples = select.flow(graph, lambda op: annotations[op.name], heads, 0)
    for name, dim in samples.items():
        if name not in found and annotations[name].sizes[dim] % size == 0:
            found[name] = dim
    return tuple(Split(name, dim, "pipeline") for name, dim in found.items())


def _uneven(rows: int, name: str, size: int) -> InfeasibleError:
    return InfeasibleError(
        f"{size} positions do not divide the {rows} rows of {name}",
        remedy="use a number of positions that does, or pad the vocabulary",
    )


def _order(stages: Sequence[Stage], size: int, count: int) -> Order:
    if len(stages) == size + 2:
        return shared.interlaced(size, count)
    placement = [stage.devices for stage in stages]
    costs = [Cost(1, 1, 1, 0 if len(stage.devices) > 1 else 1) for stage in stages]
    for limit in (size, size * len(stages)):
        one = problem_of(placement, costs, num_devices=size, memory_limit=limit)
        try:
            rows = greedy.best(one.repeat(count)).rows
        except InfeasibleError:
            continue
        return Order("interlaced list schedule", tuple(placement), count, rows)
    raise InfeasibleError(f"no order was found for {count} microbatches over {size} positions")
