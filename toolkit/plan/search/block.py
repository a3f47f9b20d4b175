"""One segment of the chain (a block, or what lies around the blocks) as an inner problem.

Nodes are the segment's operators, with the ways to split them, and tensors that several operators
read, with the layouts they may be held in; edges move tensors forward and gradients back. A block
that follows a copy of itself hands its outputs to its own inputs, so the problem closes in a ring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from toolkit.ir.graph import Op, OpGraph, Tensor
from toolkit.plan.chain import Segment as Run
from toolkit.plan.predict.alive import Alive
from toolkit.plan.program import rules
from toolkit.plan.search.intra_op import Edge, Node, Problem, Solution
from toolkit.plan.search.layouts import (
    Axis,
    AxisName,
    Layout,
    R,
    Resharding,
    V,
    Way,
    local_shape,
    share,
    ways,
)
from toolkit.plan.search.local import Parts

Dims = tuple[str | None, ...]


@dataclass(frozen=True)
class End:
    """One end of a link: the layout of the tensor there, and of its gradient."""

    tensor: Layout
    gradient: Layout


@dataclass(frozen=True)
class Weights:
    """How inner costs are added up: what counts is time per microbatch, and bytes at the peak."""

    microbatches: int = 1
    recompute: bool = False
    held: float = 4.0  # bytes at the peak for each byte of weights: gradient and moments too
    alive: float = 1.0  # microbatches whose activations are alive


@dataclass(frozen=True)
class Cost:
    """What a segment takes on one rank, for one microbatch unless said otherwise.

    `again_s` is what recomputing it adds to the backward, `weight_s` the part of the backward
    that makes gradients of weights, `sync_s` (a step) what reducing gradients of weights over the
    axes takes. Bytes are local: `entering_bytes` are what recomputation keeps, `temporary_bytes`
    what the fullest operator takes beyond what is saved, `owed_bytes` what the input's half of
    backward leaves to the other.
    """

    forward_s: float
    backward_s: float
    weight_s: float
    again_s: float
    sync_s: float
    saved_bytes: int
    entering_bytes: int
    temporary_bytes: int
    owed_bytes: int
    parameters: Mapping[str, Tensor]  # as they are on this rank


@dataclass
class Chosen:
    """A solved segment: the identifiers its operators split, and the ends it shows to others."""

    dims: Mapping[str, Dims]  # operator -> identifier per axis
    makes: Mapping[str, End]  # tensors made here
    takes: Mapping[str, End]  # tensors from outside
    made: Mapping[str, End] = field(default_factory=dict)  # by segments solved before
    taken: Mapping[str, Sequence[End]] = field(default_factory=dict)
    memory: float = 0.0
    gap: float = 0.0  # how far from the best it may be, relative
    method: str = ""
    passing: tuple[int, int] | None = None


@dataclass
class Segment:
    """Operators to be laid out together. `loops` maps a tensor that the previous copy of this
    block makes to the one that corresponds to it here.
    """

    graph: OpGraph  # of the segment alone
    ops: tuple[Op, ...]
    axes: tuple[Axis, ...]
    resharding: Resharding
    parts: Parts
    learned: frozenset[str]
    first_keeper: Mapping[str, str]  # saved memory -> the operator that keeps it first
    num_samples: int
    loops: Mapping[str, str] = field(default_factory=dict)
    may_split: Callable[[str, str, AxisName], bool] | None = None
    _ways: dict[str, tuple[Way, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.active = tuple(op for op in self.ops if any(t in self.learned for t in op.outputs))
        self._last_saver = max((i for i, op in enumerate(self.ops) if self._saves(op)), default=-1)
        self._place = {op.name: i for i, op in enumerate(self.ops)}

    # Options --------------------------------------------------------------------------------

    def ways(self, op: Op) -> tuple[Way, ...]:
        """Return the ways to run `op`: all the annotation allows, save splitting samples (the
        data axis does that) and, over the context axis, parameters.
        """
        if op.name not in self._ways:
            found = rules.annotation(op, self.graph)
            weights = {
                name
                for place, tensor in enumerate(op.inputs)
                if self.graph.tensors[tensor].role == "parameter"
                for dim in found.inputs[place]
                for name in dim
            }
            inplace = any("@" in name for name in op.outputs)

            def allowed(name: str, axis: AxisName) -> bool:
                if inplace or (axis == "context" and name in weights):
                    return False
                if found.sizes[name] == self.num_samples and self._leads(op, name):
                    return False
                return self.may_split is None or self.may_split(op.name, name, axis)

            self._ways[op.name] = ways(found, self.axes, allowed)
        return self._ways[op.name]

    def _leads(self, op: Op, name: str) -> bool:
        """Whether an identifier is the first dim of an output or of every input that has it."""
        found = rules.annotation(op, self.graph)
        return any(spec and spec[0][:1] == (name,) for spec in (*found.outputs, *found.inputs))

    def _saves(self, op: Op) -> bool:
        return any(self.first_keeper.get(name) for name, _ in self._whole_kept(op))

    def _whole_kept(self, op: Op) -> tuple[tuple[str, int], ...]:
        return self.parts.part(op, self.ways(op)[0]).kept if self._is_active(op) else ()

    def _is_active(self, op: Op) -> bool:
        return any(name in self.learned for name in op.outputs)

    # The problem ----------------------------------------------------------------------------

    def solve(
        self,
        weights: Weights,
        made: Mapping[str, End],
        taken: Mapping[str, Sequence[End]],
        *,
        fixed: Mapping[str, Dims] | None = None,
        memory_limit: float = float("inf"),
        time_limit_s: float = 5.0,
        gap: float = 1e-3,
    ) -> Chosen | None:
        """Return the best layout of the segment, or None when no layout stays within the limit.

        `made` and `taken` are the ends of tensors that other, solved segments make and read.
        `fixed` operators are split as given.
        """
        built = _Built(self, weights, made, taken, fixed)
        found = built.problem.solve(memory_limit, time_limit_s=time_limit_s, gap=gap)
        return None if found is None else built.chosen(found)

    def least_memory(self, weights: Weights) -> float:
        """Return the least memory of any layout, as `weights` count it."""
        return _Built(self, weights, {}, {}, None).problem.least_memory

    def cost(self, chosen: Chosen, parts: Parts | None = None) -> Cost:
        """Return what a layout costs on the device of `parts` (default: the one searched for)."""
        parts = parts or self.parts
        forward_s = backward_s = weight_s = again_s = 0.0
        partial: dict[tuple[Layout, Layout], float] = {}
        saved = 0
        held: dict[str, Tensor] = {}
        for op in self.ops:
            way = self.way(op, chosen.dims.get(op.name))
            part = parts.part(op, way)
            forward_s += part.forward_s
            again_s += part.forward_s
            backward_s += part.backward_s
            weight_s += part.weight_s
            saved += sum(size for name, size in part.kept if self.first_keeper.get(name) == op.name)
            for key, size in self._partial(op, way):
                partial[key] = partial.get(key, 0.0) + size
            held.update(self.held(op, way))
        temporary, owed = self._passing(chosen)
        moves = _Built(self, Weights(), chosen.made, chosen.taken, chosen.dims).moves()
        return Cost(
            forward_s=forward_s + moves.forward_s,
            backward_s=backward_s + moves.backward_s,
            weight_s=weight_s,
            again_s=again_s + moves.again_s,
            sync_s=sum(self.resharding.seconds(size, *key) for key, size in partial.items()),
            saved_bytes=saved,
            entering_bytes=self._entering(chosen),
            temporary_bytes=temporary,
            owed_bytes=owed,
            parameters=held,
        )

    def way(self, op: Op, dims: Dims | None) -> Way:
        """Return the way of `op` that splits `dims`; replicated when not given."""
        options = self.ways(op)
        return next((way for way in options if dims and way.dims == dims), options[0])

    def sync_s(self, op: Op, way: Way) -> float:
        """Seconds a step of summing gradients of weights that are whole on an axis which splits
        the work.
        """
        return sum(self.resharding.seconds(size, *key) for key, size in self._partial(op, way))

    def _partial(self, op: Op, way: Way) -> Iterator[tuple[tuple[Layout, Layout], float]]:
        """Yield (layout of the gradient, layout it is wanted in) and bytes of such weights."""
        for name, left in zip(op.inputs, way.leaves, strict=True):
            tensor = self.graph.tensors[name]
            if tensor.role == "parameter" and tensor.requires_grad and V in left:
                target = tuple(R if slot == V else slot for slot in left)
                yield (left, target), float(tensor.num_bytes)

    def held(self, op: Op, way: Way) -> dict[str, Tensor]:
        """Return the parameters that `op` reads, as they are on this rank."""
        return {
            name: self._part(name, read)
            for name, read in zip(op.inputs, way.reads, strict=True)
            if self.graph.tensors[name].role == "parameter"
        }

    def _part(self, name: str, layout: Layout) -> Tensor:
        tensor = self.graph.tensors[name]
        return replace(tensor, shape=local_shape(tensor.shape, layout, self.axes))

    def _passing(self, chosen: Chosen) -> tuple[int, int]:
        """What the fullest operator takes beyond what is saved, and what the input's half of
        backward leaves to the weights' half, in bytes; a tensor is as large as where it is largest.
        """
        if chosen.passing is None:
            largest: dict[str, Tensor] = {}
            for op in self.ops:
                way = self.way(op, chosen.dims.get(op.name))
                ends = [*zip(op.inputs, way.reads), *zip(op.outputs, way.makes)]  # noqa: B905
                for name, layout in ends:
                    part = self._part(name, layout)
                    if name not in largest or part.numel > largest[name].numel:
                        largest[name] = part
            local = replace(self.graph, tensors={**self.graph.tensors, **largest})
            life = Alive(local, self.parts.kernels).life([Run(None, self.ops)], (), local.outputs)
            fullest = max(moment.total for moment in (*life.forward, *life.backward))
            chosen.passing = max(0, fullest - life.kept), life.owed
        return chosen.passing

    def _entering(self, chosen: Chosen) -> int:
        made = {name for op in self.ops for name in op.outputs}
        read = dict.fromkeys(name for op in self.ops for name in op.inputs if name not in made)
        total = 0
        for name in read:
            tensor = self.graph.tensors[name]
            if tensor.role == "activation":
                end = chosen.takes.get(name)
                total += tensor.num_bytes // (share(end.tensor, self.axes) if end else 1)
        return total

    def repeated(self, consumers: Sequence[Op]) -> bool:
        """Whether recomputing moves a tensor to these operators again: something from the first
        of them on is still needed.
        """
        return min(self._place[op.name] for op in consumers) <= self._last_saver


class Moves(NamedTuple):
    """Seconds of moving tensors: forward, gradients back, and forward again to recompute."""

    forward_s: float
    backward_s: float
    again_s: float


class _Ends(NamedTuple):
    """The ends that the options of a node have of one tensor; `node` None: only one, given."""

    node: int | None
    ends: list[End]


class _Link(NamedTuple):
    first: _Ends
    second: _Ends
    name: str
    again: bool


class _Built:
    """The nodes and edges of a segment."""

    def __init__(
        self,
        segment: Segment,
        weights: Weights,
        made: Mapping[str, End],
        taken: Mapping[str, Sequence[End]],
        fixed: Mapping[str, Dims] | None,
    ) -> None:
        self.segment = segment
        self.weights = weights
        self.made = made
        self.taken = taken
        self.nodes: list[Node] = []
        self.edges: list[Edge] = []
        self.ways: dict[int, list[Way]] = {}
        self.held: dict[str, _Ends] = {}
        self.at: dict[str, int] = {}
        self.links: list[_Link] = []
        for op in segment.active:
            one = None if fixed is None else [segment.way(op, fixed.get(op.name))]
            self._operator(op, one or list(segment.ways(op)))
        self._producer = {name: op for op in segment.active for name in op.outputs}
        for name, readers in self._readers().items():
            self._tensor(name, readers)
        for name, ends in taken.items():
            for end in ends:
                source = self._source(name)
                if source is not None:
                    self._link(source, _Ends(None, [end]), name, again=False)

    # Nodes ----------------------------------------------------------------------------------

    def _operator(self, op: Op, chosen: list[Way]) -> None:
        segment, weights = self.segment, self.weights
        times = 2 if weights.recompute else 1
        seconds, memory = [], []
        for way in chosen:
            part = segment.parts.part(op, way)
            sync_s = segment.sync_s(op, way) / weights.microbatches
            seconds.append(times * part.forward_s + part.backward_s + sync_s)
            saved = sum(
                size for name, size in part.kept if segment.first_keeper.get(name) == op.name
            )
            held = sum(tensor.num_bytes for tensor in segment.held(op, way).values())
            memory.append(weights.held * held + (0 if weights.recompute else weights.alive * saved))
        self.at[op.name] = self._add(op.name, seconds, memory)
        self.ways[self.at[op.name]] = chosen

    def _add(self, name: str, seconds: Any, memory: Any) -> int:
        self.nodes.append(Node(name, np.array(seconds, float), np.array(memory, float)))
        return len(self.nodes) - 1

    def _readers(self) -> dict[str, list[tuple[Op, int]]]:
        """Tensor -> (operator, place) that reads it, of tensors that depend on a parameter."""
        found: dict[str, list[tuple[Op, int]]] = {}
        for op in self.segment.active:
            for place, name in enumerate(op.inputs):
                tensor = self.segment.graph.tensors[name]
                if tensor.role == "activation" and name in self.segment.learned:
                    found.setdefault(name, []).append((op, place))
        return found

    # Links ----------------------------------------------------------------------------------

    def _tensor(self, name: str, readers: list[tuple[Op, int]]) -> None:
        again = self.segment.repeated([op for op, _ in readers])
        source = self._source(name)
        consumers = []
        for op, place in readers:
            node = self.at[op.name]
            ends = [End(way.reads[place], way.leaves[place]) for way in self.ways[node]]
            consumers.append(_Ends(node, ends))
        if len(consumers) == 1:
            if source is not None:
                self._link(source, consumers[0], name, again=again)
            return
        held = self._holdings(consumers, source)
        zeros = np.zeros(len(held))
        between = _Ends(self._add(f"={name}", zeros, zeros), held)
        self.held[name] = between
        if source is not None:
            self._link(source, between, name, again=again)
        for consumer in consumers:
            self._link(between, consumer, name, again=again)

    def _source(self, name: str) -> _Ends | None:
        """Who makes a tensor: a node here (or in the copy before), a solved segment, or unknown."""
        inner = self.segment.loops.get(name, name)
        op = self._producer.get(inner)
        if op is None:
            return _Ends(None, [self.made[name]]) if name in self.made else None
        place = list(op.outputs).index(inner)
        node = self.at[op.name]
        return _Ends(node, [End(way.makes[place], way.needs[place]) for way in self.ways[node]])

    def _holdings(self, consumers: list[_Ends], source: _Ends | None) -> list[End]:
        """Layouts a tensor may be held in between its maker and its readers: whole, with a whole
        or a partial gradient, or sliced along a dim that somebody slices; axis by axis.
        """
        ends = [end for reader in (*consumers, *filter(None, [source])) for end in reader.ends]
        found: list[tuple[Layout, Layout]] = [((), ())]
        for axis in range(len(self.segment.axes)):
            dims = sorted({end.tensor[axis] for end in ends if end.tensor[axis] >= 0})
            pairs = [(R, R), (R, V), *((dim, dim) for dim in dims)]
            found = [((*t, a), (*g, b)) for t, g in found for a, b in pairs]
        seen = {end.tensor for end in ends}
        # Two axes slice one dim only where an operator does so too.
        return [End(t, g) for t, g in found if t in seen or _once(t)]

    def _link(self, first: _Ends, second: _Ends, name: str, *, again: bool) -> None:
        times = 2 if again and self.weights.recompute else 1
        forward, back = self._matrices(name, first.ends, second.ends)
        seconds = times * forward + back
        if first.node is not None and second.node is not None:
            self.edges.append(Edge(first.node, second.node, seconds))
        elif second.node is not None:
            self._more(second.node, seconds[0])
        elif first.node is not None:
            self._more(first.node, seconds[:, 0])
        self.links.append(_Link(first, second, name, again))

    def _more(self, place: int, seconds: Any) -> None:
        node = self.nodes[place]
        self.nodes[place] = Node(node.name, node.seconds + seconds, node.memory)

    def _matrices(self, name: str, firsts: list[End], seconds: list[End]) -> tuple[Any, Any]:
        tensor = self.segment.graph.tensors[name]
        move = self.segment.resharding.seconds
        size = float(tensor.num_bytes)

        def table(rows: list[Layout], columns: list[Layout], *, flip: bool) -> Any:
            """Price distinct layouts once, and spread the prices over the options."""
            one, other = list(dict.fromkeys(rows)), list(dict.fromkeys(columns))
            prices = np.array(
                [[move(size, b, a) if flip else move(size, a, b) for b in other] for a in one]
            )
            at_one = [one.index(row) for row in rows]
            at_other = [other.index(column) for column in columns]
            return prices[np.ix_(at_one, at_other)]

        forward = table([e.tensor for e in firsts], [e.tensor for e in seconds], flip=False)
        if not tensor.requires_grad:
            return forward, np.zeros_like(forward)
        back = table([e.gradient for e in firsts], [e.gradient for e in seconds], flip=True)
        return forward, back

    # The result -----------------------------------------------------------------------------

    @cached_property
    def problem(self) -> Problem:
        return Problem(tuple(self.nodes), tuple(self.edges))

    def chosen(self, found: Solution) -> Chosen:
        """Return the layouts that a solution of the problem stands for."""
        dims: dict[str, Dims] = {}
        makes: dict[str, End] = {}
        takes: dict[str, End] = {}
        for op in self.segment.active:
            way = self._way(op, found)
            dims[op.name] = way.dims
            for place, name in enumerate(op.outputs):
                makes[name] = End(way.makes[place], way.needs[place])
        for name, readers in self._readers().items():
            if name in self.held:
                between = self.held[name]
                assert between.node is not None
                takes[name] = between.ends[found.options[between.node]]
            else:
                op, place = readers[0]
                way = self._way(op, found)
                takes[name] = End(way.reads[place], way.leaves[place])
        outside = {name: end for name, end in takes.items() if name not in makes}
        return Chosen(
            dims, makes, outside, self.made, self.taken, found.memory, found.gap, found.method
        )

    def _way(self, op: Op, found: Solution) -> Way:
        node = self.at[op.name]
        return self.ways[node][found.options[node]]

    def moves(self) -> Moves:
        """Return what the links take where they cost least."""
        found = self.problem.solve()
        assert found is not None
        forward_s = backward_s = again_s = 0.0
        for link in self.links:
            one, other = (
                end.ends[0 if end.node is None else found.options[end.node]]
                for end in (link.first, link.second)
            )
            forward, back = self._matrices(link.name, [one], [other])
            forward_s += float(forward[0, 0])
            backward_s += float(back[0, 0])
            again_s += float(forward[0, 0]) if link.again else 0.0
        return Moves(forward_s, backward_s, again_s)


def _once(layout: Layout) -> bool:
    sliced = [slot for slot in layout if slot >= 0]
    return len(set(sliced)) == len(sliced)
