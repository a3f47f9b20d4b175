"""The nodes and edges of a segment's problem: operators with the ways to split them, tensors that
several read with the layouts they may be held in, and what moving tensors between them takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from toolkit.ir.graph import Op
from toolkit.plan.search.choice import Chosen, Dims, End, Side, Weights
from toolkit.plan.search.intra_op import Edge, Node, Problem, Solution
from toolkit.plan.search.layouts import Way

if TYPE_CHECKING:
    from toolkit.plan.search.block import Segment


class Moves(NamedTuple):
    """Seconds of moving tensors: forward, gradients back, and forward again to recompute."""

    forward_s: float
    backward_s: float
    again_s: float


class _Ends(NamedTuple):
    """The ends that the options of a node have of one tensor; `node` None: only one, given."""

    node: int | None
    side: Side

    @staticmethod
    def given(end: End) -> _Ends:
        return _Ends(None, Side((end,)))


class _Link(NamedTuple):
    first: _Ends
    second: _Ends
    name: str
    again: bool


class Links:
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
        self.ways: dict[int, tuple[Way, ...]] = {}
        self.held: dict[str, _Ends] = {}
        self.at: dict[str, int] = {}
        self.links: list[_Link] = []
        for op in segment.active:
            one = None if fixed is None else (segment.way(op, fixed.get(op.name)),)
            self._operator(op, one or segment.ways(op))
        self._producer = {name: op for op in segment.active for name in op.outputs}
        for name, readers in self._readers().items():
            self._tensor(name, readers)
        for name, ends in taken.items():
            for end in ends:
                source = self._source(name)
                if source is not None:
                    self._link(source, _Ends.given(end), name, again=False)

    # Nodes ----------------------------------------------------------------------------------

    def _operator(self, op: Op, chosen: tuple[Way, ...]) -> None:
        weights = self.weights
        times = self.segment.num_forwards + (1 if weights.recompute else 0)
        seconds, memory = [], []
        for way in chosen:
            one = self.segment.option(op, way)
            seconds.append(
                times * one.forward_s + one.backward_s + one.sync_s / weights.microbatches
            )
            memory.append(weights.memory(one))
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
            consumers.append(_Ends(node, self.segment.read(op, place, self.ways[node])))
        if len(consumers) == 1:
            if source is not None:
                self._link(source, consumers[0], name, again=again)
            return
        held = self.segment.holdings(
            {at.side.tensors for at in (*consumers, *filter(None, [source]))}
        )
        zeros = np.zeros(len(held.ends))
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
            return _Ends.given(self.made[name]) if name in self.made else None
        place = op.outputs.index(inner)
        node = self.at[op.name]
        return _Ends(node, self.segment.made(op, place, self.ways[node]))

    def _link(self, first: _Ends, second: _Ends, name: str, *, again: bool) -> None:
        times = self.segment.num_forwards + (1 if again and self.weights.recompute else 0)
        forward, back = self._matrices(name, first.side, second.side)
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

    def _matrices(self, name: str, first: Side, second: Side) -> tuple[Any, Any]:
        """Price distinct layouts once, and spread the prices over the options."""
        tensor = self.segment.graph.tensors[name]
        table = self.segment.resharding.table
        size = float(tensor.num_bytes)
        prices = table(size, first.tensors, second.tensors)
        forward = prices[first.tensor_at[:, None], second.tensor_at]
        if not tensor.requires_grad:
            return forward, np.zeros_like(forward)
        prices = table(size, second.gradients, first.gradients)
        return forward, prices[second.gradient_at, first.gradient_at[:, None]]

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
                takes[name] = between.side.ends[found.options[between.node]]
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
        move = self.segment.resharding.seconds
        forward_s = backward_s = again_s = 0.0
        for link in self.links:
            one, other = (
                end.side.ends[0 if end.node is None else found.options[end.node]]
                for end in (link.first, link.second)
            )
            tensor = self.segment.graph.tensors[link.name]
            forward = move(float(tensor.num_bytes), one.tensor, other.tensor)
            forward_s += forward
            again_s += forward if link.again else 0.0
            if tensor.requires_grad:
                backward_s += move(float(tensor.num_bytes), other.gradient, one.gradient)
        return Moves(forward_s, backward_s, again_s)
