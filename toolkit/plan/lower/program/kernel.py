"""A segment made ready to run: torch functions over numbered places, each freed at its last use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from toolkit.plan.lower.program import shortcuts
from toolkit.plan.lower.program.exchange import Slot
from toolkit.plan.lower.program.items import Key, Read, Segment, Value
from toolkit.plan.lower.program.move import put_together
from toolkit.plan.lower.program.weights import Weight
from toolkit.plan.lower.program.write import Written
from toolkit.plan.tensors import Mask

# (name of an input or a buffer, which part of it) -> the tensor
Sources = Callable[[str, Mask], Tensor]
# A place is filled by a weight's part, a source's part, or what was made before.
_Source = tuple[str, Mask, Slot | None]


class _Enter(torch.autograd.Function):
    """Where a value enters a segment: the same value, with a gradient of its own."""

    @staticmethod
    def forward(ctx: object, anchor: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, gradient


@dataclass(frozen=True)
class Trace:
    """What a segment leaves for its backward: where gradients leave autograd, and enter it."""

    values: tuple[tuple[Key, GradientEdge], ...]
    weights: tuple[tuple[Weight, Slot, GradientEdge], ...]
    leaves: tuple[tuple[Value, GradientEdge], ...]


_Run = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class _Step:
    run: _Run
    again: _Run  # what is run for the backward alone
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    dead: tuple[int, ...]


# As a step, before it is known what is read last where.
_Planned = tuple[_Run, _Run, list[int], list[int]]


class Kernel:
    """One segment on one rank."""

    def __init__(self, segment: Segment, written: Written, weights: Mapping[str, Weight]) -> None:
        self.segment = segment
        self.graph = written.graph
        self.weights = weights
        self._places: dict[object, int] = {}
        self.sources: list[tuple[int, _Source]] = []
        steps: list[_Planned] = []
        for index, call in enumerate(segment.calls):
            reads = [self._read(read, steps) for read in call.reads]
            writes = [self._place((value, ())) for value in call.writes]
            run = shortcuts.runner(call, written)
            again = shortcuts.unread if index in segment.unread else run
            steps.append((run, again, reads, writes))
        self.enters = [(self._place(key), key) for key in segment.enters]
        self.leaves = [(self._place((value, ())), value) for value in segment.leaves]
        self.steps = _with_dead(steps, {place for place, _ in self.leaves})

    def _place(self, key: object) -> int:
        return self._places.setdefault(key, len(self._places))

    def _read(
        self,
        read: Read,
        steps: list[_Planned],
    ) -> int:
        """The place an input is read from, with the step that puts it there if one is needed."""
        if not read.keys:
            source: _Source = (read.tensor, read.mask, read.slot)
            if source not in self._places:
                self.sources.append((self._place(source), source))
            return self._place(source)
        key = read.keys[0]
        if len(read.keys) == 1 and key[0].box == read.mask.box:
            return self._place(key)
        together = "together", read.tensor, read.mask
        if together not in self._places:
            masks = [Mask(value.box) for value, _ in read.keys]
            target = Mask(read.mask.box)

            def run(*values: Tensor) -> tuple[Tensor, ...]:
                return (put_together(target, masks, values),)

            places = [self._place(key) for key in read.keys]
            steps.append((run, run, places, [self._place(together)]))
        return self._place(together)

    def run(
        self,
        values: Mapping[Value, Tensor],
        sources: Sources,
        anchor: Tensor | None,
        *,
        again: bool = False,
    ) -> tuple[list[tuple[Value, Tensor]], Trace | None]:
        """Run on values made before; return those that leave, and with an `anchor` (a scalar that
        needs a gradient) the trace for backward. `again` leaves out what only the forward needs.
        """
        held: list[Tensor | None] = [None] * len(self._places)
        entered, weighed = [], []
        for place, key in self.enters:
            value = values[key[0]]
            if anchor is not None and self.graph.tensors[key[0].tensor].requires_grad:
                value = _Enter.apply(anchor, value)
                entered.append((key, get_gradient_edge(value)))
            held[place] = value
        for place, (name, mask, slot) in self.sources:
            weight = self.weights.get(name)
            value = weight.part(mask) if weight else sources(name, mask)
            if weight and slot is not None and anchor is not None:
                value = _Enter.apply(anchor, value)
                weighed.append((weight, slot, get_gradient_edge(value)))
            held[place] = value
        for step in self.steps:
            run = step.again if again else step.run
            made = run(*[held[place] for place in step.reads])
            for place, result in zip(step.writes, made, strict=True):
                held[place] = result
            for place in step.dead:
                held[place] = None
        leaving, edges = [], []
        for place, made_as in self.leaves:
            left = held[place]
            assert left is not None
            if left.requires_grad:
                edges.append((made_as, get_gradient_edge(left)))
                left = left.detach()
            leaving.append((made_as, left))
        if anchor is None:
            return leaving, None
        return leaving, Trace(tuple(entered), tuple(weighed), tuple(edges))


class Gradients:
    """Gradients of one microbatch, added up by what they are of.

    The first of a key may be shared with others, and is not written to; a sum made here is.
    """

    def __init__(self) -> None:
        self._held: dict[Key, Tensor] = {}
        self._sums: set[Key] = set()

    def add(self, key: Key, value: Tensor) -> None:
        before = self._held.get(key)
        if before is None:
            self._held[key] = value
        elif key in self._sums:
            before += value
        else:
            self._held[key] = before + value
            self._sums.add(key)

    def get(self, key: Key) -> Tensor | None:
        return self._held.get(key)

    def pop(self, key: Key) -> Tensor | None:
        self._sums.discard(key)
        return self._held.pop(key, None)


def backward(trace: Trace, gradients: Gradients) -> None:
    """Run a segment's backward: read the gradients of what left it, add those of what entered."""
    left = [(edge, gradients.get((value, ()))) for value, edge in trace.leaves]
    roots = [(edge, given) for edge, given in left if given is not None]
    targets = [edge for _, edge in trace.values] + [edge for _, _, edge in trace.weights]
    if not roots or not targets:
        return
    found = torch.autograd.grad(
        [edge for edge, _ in roots], targets, [given for _, given in roots], allow_unused=True
    )
    for (key, _), value in zip(trace.values, found, strict=False):
        if value is not None:
            gradients.add(key, value)
    for (weight, slot, _), value in zip(trace.weights, found[len(trace.values) :], strict=True):
        if value is not None:
            weight.add(slot, value)


def _with_dead(steps: Sequence[_Planned], kept: set[int]) -> list[_Step]:
    """The steps with the places that nothing reads after each."""
    seen = set(kept)
    found = []
    for run, again, reads, writes in reversed(steps):
        dead = tuple(place for place in dict.fromkeys((*reads, *writes)) if place not in seen)
        seen.update(dead)
        found.append(_Step(run, again, tuple(reads), tuple(writes), dead))
    return found[::-1]
