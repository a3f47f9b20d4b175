"""What one microbatch does on one rank of a stage: computing, with the calls it waits for.

A stage is a row of pieces (its blocks, and what lies around them); each piece has steps for every
kind of action: F forward, B backward, I and W its halves. W is the products that make Linears'
weight gradients, I everything else (see lower/deferred.py).
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from toolkit.ir import formulas
from toolkit.ir.graph import Op, OpGraph
from toolkit.plan.chain import Segment
from toolkit.plan.predict.alive import is_put_off
from toolkit.plan.predict.costs import Call, Costs


@dataclass(frozen=True)
class Step:
    """Computing for `seconds`, then calls that the next step waits for."""

    seconds: float
    calls: tuple[Call, ...] = ()

    @property
    def total_s(self) -> float:
        return self.seconds + sum(call.seconds for call in self.calls)


Steps = tuple[Step, ...]


@dataclass(frozen=True)
class Piece:
    """One segment of a stage, for one microbatch. `unit` is what the data axis gathers and reduces
    it with.
    """

    path: str | None
    steps: Mapping[str, Steps]

    @property
    def unit(self) -> str:
        return self.path or ""


@dataclass(frozen=True)
class OpCalls:
    """Calls around single operators, by the operator's name: what splitting a model over ranks
    makes forward and backward wait for.

    `again` are those of `after` that recomputation repeats; `at_end` come once, after the last
    backward. Blocks in `alone` have other calls than those of the same structure. Operators in
    `gathered` read their input as `whole` has it: what comes before has gathered it.
    """

    before: Mapping[str, tuple[Call, ...]] = field(default_factory=dict)
    after: Mapping[str, tuple[Call, ...]] = field(default_factory=dict)
    before_backward: Mapping[str, tuple[Call, ...]] = field(default_factory=dict)
    after_backward: Mapping[str, tuple[Call, ...]] = field(default_factory=dict)
    again: frozenset[str] = frozenset()
    at_end: tuple[Call, ...] = ()
    alone: frozenset[str] = frozenset()
    gathered: frozenset[str] = frozenset()
    whole: OpGraph | None = None


class Passes:
    """Makes the pieces of one position's stages. `local` is the graph of its shapes; blocks of
    one structure are worked out once.
    """

    def __init__(self, local: OpGraph, costs: Costs, calls: OpCalls, position: int) -> None:
        self.local = local
        self.costs = costs
        self.calls = calls
        self.position = position
        self._alike: dict[tuple[str, bool, str | None], Mapping[str, Steps]] = {}

    @cached_property
    def _frozen(self) -> OpGraph:
        """The graph as the first half of backward sees it: Linears' weights take no gradient."""
        return _without_weights(self.local)

    @cached_property
    def _whole(self) -> OpGraph:
        return self.calls.whole or self.local

    @cached_property
    def _whole_frozen(self) -> OpGraph:
        return _without_weights(self._whole)

    def _read(self, op: Op, graph: OpGraph) -> OpGraph:
        """The graph with the shapes that `op` reads."""
        if op.name not in self.calls.gathered:
            return graph
        return self._whole if graph is self.local else self._whole_frozen

    def piece(self, segment: Segment, *, kinds: Container[str], recompute: bool) -> Piece:
        """Return a segment with steps for `kinds` of actions."""
        own = segment.path if segment.path in self.calls.alone else None
        key = (segment.structure, recompute, own)
        steps = self._alike.get(key) if segment.structure else None
        if steps is None:
            steps = self._alike[key] = self._steps(segment, kinds, recompute)
        return Piece(segment.path, steps)

    def _steps(self, segment: Segment, kinds: Container[str], recompute: bool) -> dict[str, Steps]:
        forward = self._forward(segment.ops)
        steps: dict[str, Steps] = {"F": forward}
        # A pass without gradients is not run again.
        learns = any(op.name in self.local.differentiated for op in segment.ops)
        again = self._forward(segment.ops, again=True) if recompute and learns else ()
        whole = (*again, *self._backward(segment.ops, self.local))
        if "B" in kinds:
            steps["B"] = whole
        if "I" in kinds:
            steps["I"] = (*again, *self._backward(segment.ops, self._frozen))
            rest_s = sum(step.seconds for step in whole)
            rest_s -= sum(step.seconds for step in steps["I"])
            steps["W"] = (Step(max(0.0, rest_s)),)
        return steps

    def _forward(self, ops: Sequence[Op], *, again: bool = False) -> Steps:
        steps = _Steps()
        for op in ops:
            steps.wait(self.calls.before.get(op.name, ()))
            seconds = self.costs.forward_s(op, self._read(op, self.local), self.position)
            steps.compute(seconds)
            if not again or op.name in self.calls.again:
                steps.wait(self.calls.after.get(op.name, ()))
        return steps.made

    def _backward(self, ops: Sequence[Op], graph: OpGraph) -> Steps:
        steps = _Steps()
        for op in reversed(ops):
            # Calls do not depend on which half of backward this is: they are the input's.
            reached = op.name in self.local.differentiated
            steps.wait(self.calls.before_backward.get(op.name, ()) if reached else ())
            seconds = self.costs.backward_s(op, self._read(op, graph), self.position)
            steps.compute(seconds)
            steps.wait(self.calls.after_backward.get(op.name, ()) if reached else ())
        return steps.made


def _without_weights(graph: OpGraph) -> OpGraph:
    tensors = dict(graph.tensors)
    for op in graph.ops:
        if is_put_off(op, graph):
            weight = formulas.tensor_of(op, graph, "weight")
            tensors[weight.name] = replace(weight, requires_grad=False)
    return replace(graph, tensors=tensors, scaling=None)


class _Steps:
    """Collects steps: computing goes on until something is waited for."""

    def __init__(self) -> None:
        self._done: list[Step] = []
        self._seconds = 0.0

    def compute(self, seconds: float) -> None:
        self._seconds += seconds

    def wait(self, calls: tuple[Call, ...]) -> None:
        if calls:
            self._done.append(Step(self._seconds, calls))
            self._seconds = 0.0

    @property
    def made(self) -> Steps:
        return (*self._done, Step(self._seconds))
