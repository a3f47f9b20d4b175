"""One stage on one rank: its script run forward and backward, item by item.

Every segment is a piece of autograd by itself. What enters it is cut off from where it came from,
and its gradient is handed on here: so communication comes in the script's order, the same on all
ranks, and what is run again is a matter of running items again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from toolkit.plan.lower.program import kernel, move
from toolkit.plan.lower.program.items import (
    Item,
    Move,
    Script,
    Segment,
    Unit,
    Value,
)
from toolkit.plan.lower.program.kernel import Gradients, Kernel, Sources, Trace
from toolkit.plan.lower.program.move import Network
from toolkit.plan.lower.program.sides import Sides, message
from toolkit.plan.lower.program.weights import Weight, cut
from toolkit.plan.lower.program.write import Written

# Buffers that one half of an exchange leaves on this rank for the other half: by what it is.
Left = dict[tuple[str, int, int, bool, int], dict[str, Tensor]]


@dataclass
class Pass:
    """One microbatch in one stage: its values, its gradients, and what backward needs."""

    microbatch: int
    sources: Sources
    values: dict[Value, Tensor] = field(default_factory=dict)
    gradients: Gradients = field(default_factory=Gradients)
    traces: dict[int, Trace] = field(default_factory=dict)
    kept: dict[int, dict[Value, Tensor]] = field(default_factory=dict)


class StageRun:
    """Runs the script of one stage on this rank."""

    def __init__(
        self,
        script: Script,
        written: Written,
        weights: Mapping[str, Weight],
        network: Network,
        sides: Sides,
        left: Left,
    ) -> None:
        self.script = script
        self.graph = written.graph
        self.network = network
        self.sides = sides
        self.left = left
        found = list(segments(script.items))
        self.kernels = {one.name: Kernel(one, written, weights) for one in found}
        # A gradient is dropped after the first that made the value: co-shards make it together.
        self.first_maker: dict[Value, int] = {}
        for one in found:
            for value in one.leaves:
                self.first_maker.setdefault(value, one.name)
        self.anchor = torch.zeros((), device=network.device, requires_grad=True)
        self.passes: dict[int, Pass] = {}

    # Forward ---------------------------------------------------------------------------------

    def forward(self, microbatch: int, sources: Sources) -> Tensor | None:
        """Run forward; return the loss where this rank makes it (or its share of it)."""
        state = Pass(microbatch, sources)
        with torch.no_grad():
            for item, done in zip(self.script.items, self.script.last_uses, strict=True):
                self._item(item, state, learns=self.script.learns)
                for value in done:
                    state.values.pop(value, None)
        losses = [state.values.pop(value) for value in self.script.loss]
        if self.script.learns:
            self.passes[microbatch] = state
        return losses[0] if losses else None

    def _item(self, item: Item, state: Pass, *, learns: bool, again: bool = False) -> None:
        if isinstance(item, Segment):
            self._segment(item, state, learns=learns, again=again)
        elif isinstance(item, Move):
            self._move(item, state)
        else:
            if learns:
                self._keep(item, state)
            for inner in item.items:
                self._item(inner, state, learns=False)
            for value in item.dropped:
                state.values.pop(value, None)

    def _keep(self, unit: Unit, state: Pass) -> None:
        state.kept[unit.name] = {
            value: state.values[value] for value in unit.needed if value in state.values
        }

    def _segment(self, segment: Segment, state: Pass, *, learns: bool, again: bool) -> None:
        run = self.kernels[segment.name].run
        if learns:
            with torch.enable_grad():
                leaving, trace = run(state.values, state.sources, self.anchor, again=again)
            assert trace is not None
            state.traces[segment.name] = trace
            state.values.update(leaving)
            return
        leaving, _ = run(state.values, state.sources, None)
        for value, made in leaving:
            before = state.values.get(value)
            if before is None:
                state.values[value] = made
            else:  # co-shards add up what each makes of a tensor
                before += made

    def _move(self, item: Move, state: Pass) -> None:
        exchange, adapter = item.exchange, item.exchange.forward
        held: dict[str, Tensor] = {}
        if item.half == "arrive":
            held.update(self._taken(item, state, gradient=False))
        else:
            for name, (rank, mask) in zip(adapter.inputs, exchange.made, strict=True):
                if rank == item.rank:
                    held[name] = state.values[Value(exchange.tensor, mask.box, -1)]
        self._carry(item, state, held, gradient=False)
        if item.half == "depart":
            self._leave(item, state, held, gradient=False)
            return
        for name, (rank, mask) in zip(adapter.outputs, exchange.wanted, strict=True):
            if rank == item.rank:
                state.values[Value(exchange.tensor, mask.box, exchange.source)] = held[name]

    # Backward --------------------------------------------------------------------------------

    def backward(self, microbatch: int, scale: float) -> None:
        """Run backward from `scale` times the loss, or from the gradients that arrive."""
        state = self.passes.pop(microbatch)
        for value in self.script.loss:
            tensor = self.graph.tensors[value.tensor]
            shape = tuple(high - low for low, high in value.box)
            dtype = getattr(torch, tensor.dtype)
            ones = torch.full(shape, scale, dtype=dtype, device=self.network.device)
            state.gradients.add((value, ()), ones)
        with torch.no_grad():
            self._back(self.script.items, state)

    def _back(self, items: Sequence[Item], state: Pass) -> None:
        for item in reversed(items):
            if isinstance(item, Segment):
                kernel.backward(state.traces.pop(item.name), state.gradients)
                for value in item.leaves:
                    if self.first_maker[value] == item.name:
                        state.gradients.pop((value, ()))
            elif isinstance(item, Move):
                if item.exchange.backward is not None:
                    self._move_back(item, state)
            else:
                self._again(item, state)

    def _again(self, unit: Unit, state: Pass) -> None:
        """Run a unit again, this time keeping what backward needs, and then back."""
        inner = Pass(state.microbatch, state.sources, state.kept.pop(unit.name), state.gradients)
        for item, again in zip(unit.items, unit.again, strict=True):
            if isinstance(item, Unit):
                self._keep(item, inner)
            if again:
                self._item(item, inner, learns=not isinstance(item, Unit), again=True)
        inner.values = {}
        self._back(unit.items, inner)

    def _move_back(self, item: Move, state: Pass) -> None:
        exchange, adapter = item.exchange, item.exchange.backward
        assert adapter is not None
        held: dict[str, Tensor] = {}
        if item.half == "depart":
            held.update(self._taken(item, state, gradient=True))
        else:
            given: dict[int, Tensor] = {}
            for index, slot in enumerate(exchange.slots):
                if slot.rank == item.rank:
                    key = Value(exchange.tensor, slot.mask.box, exchange.source), slot.alike
                    value = state.gradients.pop(key)
                    given[index] = self._zeros(item, slot.mask.shape) if value is None else value
            for name, (index, mask) in zip(adapter.inputs, exchange.shares, strict=True):
                if index in given:
                    held[name] = cut(given[index], exchange.slots[index].mask, mask)
        self._carry(item, state, held, gradient=True)
        if item.half == "arrive":
            self._leave(item, state, held, gradient=True)
            return
        for name, (rank, mask) in zip(adapter.outputs, exchange.made, strict=True):
            if rank == item.rank:
                state.gradients.add((Value(exchange.tensor, mask.box, -1), ()), held[name])

    def _zeros(self, item: Move, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=self._dtype(item), device=self.network.device)

    def _dtype(self, item: Move) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.graph.tensors[item.exchange.tensor].dtype)
        return found

    # Between ranks ---------------------------------------------------------------------------

    def _carry(self, item: Move, state: Pass, held: dict[str, Tensor], *, gradient: bool) -> None:
        adapter = item.exchange.backward if gradient else item.exchange.forward
        assert adapter is not None
        microbatch = state.microbatch
        move.run(
            adapter, self.sides.tasks(item, gradient=gradient), held, self.network, item.rank,
            self._dtype(item),
            lambda number, task: (message(item, number, task, gradient=gradient), microbatch),
        )  # fmt: skip

    def _leave(self, item: Move, state: Pass, held: dict[str, Tensor], *, gradient: bool) -> None:
        """Keep for the other half what of an exchange stays on this rank."""
        exchange = item.exchange
        there = exchange.source if gradient else exchange.target
        if item.rank in self.sides.ranks[there]:
            self.left[self._name(item, state, gradient)] = held

    def _taken(self, item: Move, state: Pass, *, gradient: bool) -> dict[str, Tensor]:
        return self.left.pop(self._name(item, state, gradient), {})

    def _name(self, item: Move, state: Pass, gradient: bool) -> tuple[str, int, int, bool, int]:
        one = item.exchange
        return one.tensor, one.source, one.target, gradient, state.microbatch


def segments(items: Sequence[Item]) -> Iterator[Segment]:
    """Yield the segments of items, those of units included, in order."""
    for item in items:
        if isinstance(item, Segment):
            yield item
        elif isinstance(item, Unit):
            yield from segments(item.items)
