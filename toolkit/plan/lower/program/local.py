"""What one rank sees and communicates under a plan: the ground for predictions. No torch.

`Local` is the rank's graph, in its own shapes, and its calls op by op; `traffic` sums up a step.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from toolkit.errors import ToolkitError
from toolkit.hardware.cluster import Cluster
from toolkit.ir.graph import Op, OpGraph, item_bytes
from toolkit.plan.lower.program import reduce
from toolkit.plan.lower.program.items import Item, Move, Script, Segment
from toolkit.plan.lower.program.sides import Task
from toolkit.plan.lower.program.walk import Walk
from toolkit.plan.materialize.adapter import Adapter
from toolkit.plan.order.action import Action
from toolkit.plan.plan import Plan, Traffic
from toolkit.plan.program import halo


@dataclass(frozen=True)
class Call:
    """One communication of a rank: its kind, the ranks of the first replica (of a collective in
    order, of a message sender and receiver), and the bytes a counter would count.
    """

    kind: str
    ranks: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True)
class Pass:
    """An action as a rank runs it: operators and calls in order.

    A step is (operator, which co-shard) or a call. `again` marks those of what is run again.
    """

    steps: tuple[tuple[str, int] | Call, ...]
    again: tuple[bool, ...]


@dataclass(frozen=True)
class Local:
    """A stage on one rank. `graph` are the stage's operators with the shapes of the rank's part;
    `gathered` has, of operators that read a tensor in another shape than it is made in, the inputs
    and those shapes. `co_shards` says of operators how many parts of that shape run one after
    another. `forward` and `backward` are what the actions do, operators named in backward being
    those whose gradient is computed.
    """

    stage: int
    rank: int
    graph: OpGraph
    gathered: Mapping[str, Mapping[str, tuple[int, ...]]]
    co_shards: Mapping[str, int]
    forward: Pass
    backward: Pass


def walk_of(plan: Plan, graph: OpGraph, cluster: Cluster) -> Walk:
    """Write a plan out for prediction; `graph` may be at any batch."""
    return Walk(plan, graph, cluster)


def local(walk: Walk, stage: int, rank: int) -> Local:
    """Return what a rank sees and does in a stage, of one microbatch."""
    script = walk.script(stage, rank)
    forward = list(_forward(walk, script, script.items, again=False))
    backward = list(_backward(walk, script, script.items)) if script.learns else []
    graph = local_graph(walk, stage, rank)
    gathered = {}
    for op in graph.ops:
        read = _read_shapes(walk, stage, op, rank)
        other = {name: shape for name, shape in read if graph.tensors[name].shape != shape}
        if other:
            gathered[op.name] = other
    return Local(
        stage, rank, graph, gathered, walk.written.co_shards,
        Pass(tuple(step for step, _ in forward), tuple(again for _, again in forward)),
        Pass(tuple(step for step, _ in backward), tuple(again for _, again in backward)),
    )  # fmt: skip


_Steps = Iterator[tuple["tuple[str, int] | Call", bool]]


def _forward(walk: Walk, script: Script, items: Sequence[Item], *, again: bool) -> _Steps:
    for item in items:
        if isinstance(item, Segment):
            for step in _ops(walk, script, item):
                yield step, again
        elif isinstance(item, Move):
            for call in _calls(walk, item, gradient=False):
                yield call, again
        else:
            yield from _forward(walk, script, item.items, again=again)


def _backward(walk: Walk, script: Script, items: Sequence[Item]) -> _Steps:
    """As items.backward_moves walks, with the operators."""
    for item in reversed(items):
        if isinstance(item, Segment):
            for step in reversed(list(_ops(walk, script, item))):
                if step[0] in walk.graph.differentiated:
                    yield step, False
        elif isinstance(item, Move):
            if item.exchange.backward is not None:
                for call in _calls(walk, item, gradient=True):
                    yield call, False
        else:
            for inner, again in zip(item.items, item.again, strict=True):
                if again and isinstance(inner, Segment):
                    steps = enumerate(_ops(walk, script, inner))
                    yield from ((step, True) for at, step in steps if at not in inner.unread)
                elif again:
                    yield from _forward(walk, script, [inner], again=True)
            yield from _backward(walk, script, item.items)


def _ops(walk: Walk, script: Script, segment: Segment) -> Iterator[tuple[str, int]]:
    parts = walk.written.parts[script.stage]
    for call in segment.calls:
        yield call.op.name, parts[call.op.name][script.rank].index(call.part)


def _calls(walk: Walk, move: Move, *, gradient: bool) -> Iterator[Call]:
    adapter = move.exchange.backward if gradient else move.exchange.forward
    assert adapter is not None
    dtype = walk.graph.tensors[move.exchange.tensor].dtype
    for _, task in walk.sides.tasks(move, gradient=gradient):
        if task.what != "local":
            yield call_of(adapter, task, dtype)


def call_of(adapter: Adapter, task: Task, dtype: str) -> Call:
    """Return a task as the call that is counted for it (see counting.py)."""
    step = task.step
    if task.what in ("send", "recv"):
        size = adapter.buffer[step.writes[task.place]].mask.numel
        ranks = (step.ranks[0], step.ranks[1 + task.place])
        return Call(task.what, ranks, size * item_bytes(dtype))
    size = adapter.buffer[step.reads[0]].mask.numel
    if step.kind == "all_gather":
        size *= len(step.ranks)
    return Call(step.kind, step.ranks, size * item_bytes(dtype))


def traffic(plan: Plan, graph: OpGraph, cluster: Cluster) -> tuple[Traffic, ...]:
    """Return what a rank at each position of the pipeline axis communicates in one step, exactly.

    Raises ToolkitError when ranks of one position communicate differently.
    """
    return traffic_of(walk_of(plan, graph, cluster))


def traffic_of(walk: Walk) -> tuple[Traffic, ...]:
    """Return the traffic of a plan already written out; see `traffic`."""
    plan = walk.plan
    found: dict[int, dict[str, tuple[int, int]]] = {}
    for rank in walk.written.replica:
        counted = rank_traffic(walk, rank)
        position = rank // plan.stride("pipeline") % plan.size("pipeline")
        if found.setdefault(position, counted) != counted:
            raise ToolkitError(
                f"ranks at position {position} communicate differently: {found[position]} and, on "
                f"rank {rank}, {counted}",
                remedy="split operators along dims that all axes divide evenly",
            )
    return tuple(
        Traffic(position, kind, count, num_bytes)
        for position, calls in sorted(found.items())
        for kind, (count, num_bytes) in sorted(calls.items())
    )


def rank_traffic(walk: Walk, rank: int) -> dict[str, tuple[int, int]]:
    """Return kind -> (calls, bytes) of one rank of the first replica in one step."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()

    def add(call: Call, times: int = 1) -> None:
        counts[call.kind] += times
        sizes[call.kind] += call.num_bytes * times

    # The same for every microbatch.
    times = Counter(Action(a.stage, a.kind, 0) for a in walk.actions(rank))
    for action, number in times.items():
        for move, gradient in walk.action_moves(rank, action):
            for call in _calls(walk, move, gradient=gradient):
                add(call, number)
    for name in walk.held:
        for event in reduce.own_events(walk, name, rank):
            if event.task.what != "local":
                add(call_of(event.adapter, event.task, walk.graph.tensors[name].dtype))
    for one in reduce.reductions(walk, rank):
        add(Call("all_reduce", one.ranks, one.num_bytes))
    return {kind: (counts[kind], sizes[kind]) for kind in counts}


def _read_shapes(
    walk: Walk, stage: int, op: Op, rank: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the inputs of a rank's part of an operator, in the shapes it reads them in."""
    part = walk.written.parts[stage][op.name][rank][0]
    reads = part.reads(walk.written.annotations[op.name])
    for place, pieces in itertools.groupby(reads, key=lambda read: read[0]):
        yield op.inputs[place], halo.shape([mask for _, mask in pieces])


def local_graph(walk: Walk, stage: int, rank: int) -> OpGraph:
    """Return a stage's operators with the shapes of one rank's part (of one co-shard, where there
    are several). A tensor read in another shape than it was made in has that of its maker.
    """
    written, graph = walk.written, walk.graph
    shapes: dict[str, tuple[int, ...]] = {}
    ops = written.ops[stage]
    for op in ops:
        part = written.parts[stage][op.name][rank][0]
        for name, shape in _read_shapes(walk, stage, op, rank):
            shapes.setdefault(name, shape)
        for name, mask in zip(op.outputs, written.outputs(part), strict=True):
            shapes[name] = mask.shape
    tensors = {}
    made = {name for op in ops for name in op.outputs}
    here = {op.name for op in ops}
    for name, shape in shapes.items():
        tensor = graph.tensors[name]
        role = tensor.role if name in made or tensor.role != "activation" else "input"
        storage = tensor.storage if tensor.storage in shapes else name
        tensors[name] = replace(tensor, shape=shape, role=role, storage=storage)
    assert all(math.prod(tensor.shape) for tensor in tensors.values())
    outputs = tuple(
        name
        for name in tensors
        if name in made
        and (name in graph.outputs or any(o.name not in here for o in graph.consumers[name]))
    )
    return replace(
        graph, ops=ops, tensors=tensors,
        inputs=tuple(name for name, t in tensors.items() if t.role == "input"),
        outputs=outputs, scaling=None,
    )  # fmt: skip
