"""How long each operator of a traced model takes, one by one, in a whole forward and backward.

Operators run where they will: after one another on the model's tensors, with memory and caches as
the one before left them. Backward is autograd's; each of its nodes belongs to the operator that
made it, and the time from one node's beginning to the next one's is the first one's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.ir import interpret
from toolkit.ir.graph import Op, OpGraph
from toolkit.plan.predict import costs
from toolkit.plan.profile.fit import Observation

_WARM_UP, _REPEATS = 2, 5
_ACCUMULATE = "AccumulateGrad"


def observe(
    graph: OpGraph, tensors: Mapping[str, Tensor], begin: Callable[[], object]
) -> list[Observation]:
    """Return the median seconds of every operator of `graph`, forward and backward.

    `tensors` are the graph's parameters, buffers, constants and inputs by name. `begin` is called
    before each repeat: ranks begin together.
    """
    parameters = [tensors[one.name] for one in graph.parameters() if one.name in tensors]
    seconds: list[_Seconds] = []
    for _ in range(_WARM_UP + _REPEATS):
        for parameter in parameters:
            parameter.grad = None
        begin()
        seconds.append(_Pass(graph, tensors).run())
    measured = seconds[_WARM_UP:]
    found = []
    for index, op in enumerate(graph.ops):
        forward_s = statistics.median(one.forward[index] for one in measured)
        found.append(Observation(op.kind, costs.forward(op, graph), forward_s))
        works = costs.backward_works(op, graph, "cpu")
        backward_s = statistics.median(one.backward.get(index, 0.0) for one in measured)
        if works and backward_s > 0:
            found.append(Observation(f"{op.kind} backward", works, backward_s))
    return found


def observe_update(module: nn.Module, begin: Callable[[], object]) -> Observation:
    """Return the median seconds of AdamW over all of a module's parameters."""
    parameters = [found for found in module.parameters() if found.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = torch.optim.AdamW(parameters)
    seconds = []
    for _ in range(_WARM_UP + _REPEATS):
        begin()
        started_s = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - started_s)
    num_bytes = sum(parameter.nbytes for parameter in parameters)
    dtype = str(parameters[0].dtype).removeprefix("torch.")
    work = costs.update(num_bytes, dtype)
    return Observation(costs.UPDATE, (work,), statistics.median(seconds[_WARM_UP:]))


@dataclass
class _Seconds:
    """By the operator's place in the graph."""

    forward: list[float] = field(default_factory=list)
    backward: dict[int, float] = field(default_factory=dict)


class _Pass:
    """One forward and backward."""

    def __init__(self, graph: OpGraph, tensors: Mapping[str, Tensor]) -> None:
        self.graph = graph
        self.held = dict(tensors)
        self.owners: set[Any] = set()
        self.trail: list[tuple[float, int | None]] = []  # a node begins, of this operator

    def run(self) -> _Seconds:
        found = _Seconds()
        last = {name: op.name for op in self.graph.ops for name in _uses(op)}
        for index, op in enumerate(self.graph.ops):
            found.forward.append(self._forward(index, op))
            for name in _uses(op):
                if last[name] == op.name and name not in self.graph.outputs:
                    self.held.pop(name, None)
        loss = self.held[self.graph.outputs[0]]
        self.held.clear()
        loss.backward()
        ends = [at for at, _ in self.trail[1:]] + [time.perf_counter()]
        for (at, owner), end in zip(self.trail, ends, strict=True):
            if owner is not None:
                found.backward[owner] = found.backward.get(owner, 0.0) + end - at
        return found

    def _forward(self, index: int, op: Op) -> float:
        """Run one operator; returns its seconds."""
        target, args, kwargs = interpret.bound(op, self.held)
        with interpret.context(op):
            started_s = time.perf_counter()
            result = target(*args, **kwargs)
            seconds = time.perf_counter() - started_s
        made = iter(result if isinstance(result, (tuple, list)) else (result,))
        anew = interpret.rewritten(op)
        for name in op.outputs:
            value = self.held[anew[name]] if name in anew else next(made)
            self.held[name] = value
            if value.grad_fn is not None:
                self._watch(value.grad_fn, index)
        return seconds

    def _watch(self, node: Any, index: int) -> None:
        """Take note when `node`, and those before it that are new, begin: they are `index`'s."""
        waiting = [node]
        while waiting:
            one = waiting.pop()
            if one is None or one in self.owners:
                continue
            self.owners.add(one)
            ends = type(one).__name__ == _ACCUMULATE
            one.register_prehook(self._note(None if ends else index))
            if not ends:
                waiting += [before for before, _ in one.next_functions]

    def _note(self, index: int | None) -> Callable[[Sequence[Tensor]], None]:
        def begins(_: Sequence[Tensor]) -> None:
            self.trail.append((time.perf_counter(), index))

        return begins


def _uses(op: Op) -> Iterator[str]:
    yield from dict.fromkeys((*op.inputs, *interpret.rewritten(op).values()))
