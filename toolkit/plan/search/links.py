"""The nodes and edges of a segment's problem: operators with the ways to split them, tensors that
several read with the layouts they may be held in, and what moving tensors between them takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from toolkit.ir.graph import Op
from toolkit.plan.search.choice import Chosen, Dims, End, Weights
from toolkit.plan.search.intra_op import Edge, Node, Problem, Solution
from toolkit.plan.search.layouts import Layout, R, V, Way

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
    ends: list[End]


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
