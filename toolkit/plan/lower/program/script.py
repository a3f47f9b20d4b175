"""Writing what each rank does in each stage, from a plan that is written out (see items.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from toolkit.ir.graph import Op
from toolkit.plan.lower.program.exchange import Exchange, Exchanges, slot
from toolkit.plan.lower.program.items import (
    Call,
    Item,
    Key,
    Move,
    Read,
    Script,
    Segment,
    Unit,
    Value,
    made_values,
    makes_of,
    reads_of,
)
from toolkit.plan.lower.program.outline import Again, Node, Ops, Region, outline
from toolkit.plan.lower.program.write import Written
from toolkit.plan.program.part import Part
from toolkit.plan.tensors import Mask


class Stages:
    """The scripts of all stages and ranks of a written plan."""

    def __init__(self, written: Written, exchanges: Exchanges) -> None:
        self.written = written
        self.exchanges = exchanges
        self.outlines = tuple(outline(written, stage) for stage in range(len(written.ops)))
        self.maker: tuple[dict[str, Op], ...] = tuple(
            {name: op for op in ops for name in op.outputs} for ops in written.ops
        )
        self.own = self._owners()
        self._inside: dict[tuple[str, int], Exchange] = {}
        self.edges = self._edges()

    def _owners(self) -> dict[str, int]:
        """Tensor -> the stage that makes it for others: the first that does."""
        found: dict[str, int] = {}
        for stage, ops in enumerate(self.written.ops):
            for op in ops:
                for name in op.outputs:
                    found.setdefault(name, stage)
        return found

    def _edges(self) -> tuple[Exchange, ...]:
        """The exchanges between stages, in the order of their tensors and readers."""
        found = []
        read = [{name for op in ops for name in op.inputs} for ops in self.written.ops]
        for name, source in self.own.items():
            for target, names in enumerate(read):
                if name in names and name not in self.maker[target]:
                    found.append(self.exchanges.between(name, source, target))
        return tuple(found)

    def inside(self, tensor: str, stage: int) -> Exchange:
        """Return the exchange of a tensor within a stage."""
        if (tensor, stage) not in self._inside:
            self._inside[tensor, stage] = self.exchanges.between(tensor, stage, stage)
        return self._inside[tensor, stage]

    def script(self, stage: int, rank: int) -> Script:
        """Return what `rank` does in a stage."""
        return _Writer(self, stage, rank).script()


class _Writer:
    """Writes the script of one stage on one rank."""

    def __init__(self, stages: Stages, stage: int, rank: int) -> None:
        self.stages = stages
        self.written = stages.written
        self.graph = stages.written.graph
        self.stage, self.rank = stage, rank
        self.count = 0
        self.moved: set[str] = set()

    def script(self) -> Script:
        edges = self.stages.edges
        items: list[Item] = [
            Move(self._number(), self.rank, edge, "arrive")
            for edge in edges
            if edge.target == self.stage
        ]
        for node in self.stages.outlines[self.stage]:
            items += self._node(node)
        items += [
            Move(self._number(), self.rank, edge, "depart")
            for edge in edges
            if edge.source == self.stage
        ]
        output = self.graph.outputs[0]
        loss: tuple[Value, ...] = ()
        if self.stages.own.get(output) == self.stage:
            maker = self.graph.producer[output]
            masks = [
                self.written.outputs(part)[maker.outputs.index(output)]
                for part in self.written.parts[self.stage][maker.name][self.rank]
            ]
            loss = tuple(dict.fromkeys(Value(output, mask.box, -1) for mask in masks))
        learns = not self.written.plan.stages[self.stage].no_grad and any(
            op.name in self.graph.differentiated for op in self.written.ops[self.stage]
        )
        finished = _with_leaves(items, loss)
        return Script(self.stage, self.rank, tuple(finished), learns, loss)

    def _number(self) -> int:
        self.count += 1
        return self.count

    def _node(self, node: Node) -> list[Item]:
        if isinstance(node, Ops):
            return self._ops(node.ops)
        if isinstance(node, Region):
            return self._region(node)
        return self._again(node)

    def _again(self, node: Again) -> list[Item]:
        inside = {name for part in node.nodes for op in part.ops for name in op.outputs}
        items: list[Item] = []
        for part in node.nodes:
            for op in part.ops:
                items += self._moves(op, [name for name in op.inputs if name not in inside])
        inner = [item for part in node.nodes for item in self._node(part)]
        return [*items, self._unit(inner)]

    def _region(self, node: Region) -> list[Item]:
        items: list[Item] = []
        for op in node.ops:
            inside = {name for one in node.ops for name in one.outputs}
            items += self._moves(op, [name for name in op.inputs if name not in inside])
        region = frozenset(name for op in node.ops for name in op.outputs)
        for index in range(node.parts):
            calls = [self._call(op, index, region) for op in node.ops]
            items.append(self._unit([self._segment(calls)]))
        return items

    def _unit(self, items: list[Item]) -> Unit:
        return Unit(self._number(), tuple(items), (), (), ())

    def _ops(self, ops: Sequence[Op]) -> list[Item]:
        items: list[Item] = []
        calls: list[Call] = []
        for op in ops:
            found = self._moves(op, op.inputs)
            if found and calls:
                items.append(self._segment(calls))
                calls = []
            items += found
            for index in range(len(self.written.parts[self.stage][op.name][self.rank])):
                calls.append(self._call(op, index))
        if calls:
            items.append(self._segment(calls))
        return items

    def _moves(self, op: Op, names: Sequence[str]) -> list[Item]:
        """The moves that `op` still waits for."""
        found: list[Item] = []
        for name in dict.fromkeys(names):
            if name in self.moved or name not in self.stages.maker[self.stage]:
                continue
            exchange = self.stages.inside(name, self.stage)
            if not exchange.is_local:
                self.moved.add(name)
                found.append(Move(self._number(), self.rank, exchange, "all"))
        return found

    def _call(self, op: Op, index: int, region: frozenset[str] = frozenset()) -> Call:
        part = self.written.parts[self.stage][op.name][self.rank][index]
        reads = tuple(
            self._read(op, part, name, mask, region) for name, mask in self.written.reads(part)
        )
        writes = tuple(
            Value(name, mask.box, -1)
            for name, mask in zip(op.outputs, self.written.outputs(part), strict=True)
        )
        return Call(op, part, reads, writes)

    def _read(self, op: Op, part: Part, name: str, mask: Mask, region: frozenset[str]) -> Read:
        learns = op.name in self.graph.differentiated and self.graph.tensors[name].requires_grad
        own = slot(self.written, self.stage, self.rank, part, mask) if learns else None
        if name not in self.graph.producer:
            return Read(name, mask, (), own)
        alike = own.alike if own else ()
        if name in region:
            return Read(name, mask, ((Value(name, mask.box, -1), ()),), None)
        if name not in self.stages.maker[self.stage]:
            value = Value(name, mask.box, self.stages.own[name])
            return Read(name, mask, ((value, alike),), None)
        exchange = self.stages.inside(name, self.stage)
        if not exchange.is_local:
            return Read(name, mask, ((Value(name, mask.box, self.stage), alike),), None)
        keys = tuple((value, ()) for value in made_values(exchange, self.rank))
        return Read(name, mask, keys, None)

    def _segment(self, calls: Sequence[Call]) -> Segment:
        made: set[Value] = set()
        enters: dict[Key, None] = {}
        for call in calls:
            for read in call.reads:
                for key in read.keys:
                    if key[0] not in made:
                        enters[key] = None
            made.update(call.writes)
        leaves = tuple(dict.fromkeys(value for call in calls for value in call.writes))
        return Segment(self._number(), tuple(calls), tuple(enters), leaves)


def _with_leaves(items: Sequence[Item], after: Sequence[Value]) -> list[Item]:
    """The items with what leaves them cut down to what is read afterwards (`after` is at the end),
    and what enters units.
    """
    found: list[Item] = []
    wanted = set(after)
    for item in reversed(items):
        done = _cut(item, wanted)
        found.append(done)
        wanted.update(reads_of(done))
    return found[::-1]


def _cut(item: Item, wanted: set[Value]) -> Item:
    if isinstance(item, Segment):
        leaves = tuple(value for value in item.leaves if value in wanted)
        return replace(item, leaves=leaves)
    if isinstance(item, Move):
        return item
    inner = _with_leaves(item.items, tuple(wanted))
    made: set[Value] = set()
    needed: dict[Value, None] = {}
    for one in inner:
        needed.update(dict.fromkeys(value for value in reads_of(one) if value not in made))
        made.update(makes_of(one))
    again: list[bool] = []
    read: set[Value] = set()  # of what runs again, or is run again later
    for index in reversed(range(len(inner))):
        one = inner[index]
        again.append(isinstance(one, Segment) or not read.isdisjoint(makes_of(one)))
        if isinstance(one, Segment):
            inner[index] = replace(one, unread=_unread(one, read))
        if again[-1] or isinstance(one, Unit):
            read.update(reads_of(one))
    again.reverse()
    makes = tuple(value for value in dict.fromkeys(v for one in inner for v in makes_of(one))
                  if value in wanted)  # fmt: skip
    return Unit(item.name, tuple(inner), tuple(needed), tuple(again), makes)


def _unread(segment: Segment, read: set[Value]) -> frozenset[int]:
    """The linears whose results neither the segment nor `read` has a use for."""
    inside = {value for call in segment.calls for one in call.reads for value, _ in one.keys}
    return frozenset(
        index
        for index, call in enumerate(segment.calls)
        if call.op.kind == "aten.linear"
        and call.op.grad_enabled
        and not call.op.autocast
        and read.isdisjoint(call.writes)
        and inside.isdisjoint(call.writes)
    )
