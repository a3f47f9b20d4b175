"""Calling a torch operator many times: where its inputs go is worked out once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from toolkit.ir import interpret
from toolkit.ir.graph import Argument, Constant, Op, Ref

Runner = Callable[..., tuple[torch.Tensor, ...]]
Fill = Callable[[Sequence[torch.Tensor]], Any]


def caller(op: Op) -> Runner:
    """Return the function that calls `op`, whose arguments refer to its inputs by their place."""
    target = interpret.overload(op.target)
    fills = [
        (name, _device if name == "device" else _fill(value))
        for name, value in op.arguments.items()
    ]
    positional = [fill for _, fill in fills[: op.num_positional]]
    named = fills[op.num_positional :]

    def call(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = target(
            *[fill(inputs) for fill in positional], **{name: fill(inputs) for name, fill in named}
        )
        return tuple(made) if isinstance(made, (tuple, list)) else (made,)

    if not op.autocast and op.grad_enabled:
        return call
    dtype = getattr(torch, op.autocast) if op.autocast else None

    def guarded(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        grad = torch.is_grad_enabled() and op.grad_enabled
        kind = inputs[0].device.type if inputs else "cpu"
        with torch.set_grad_enabled(grad), torch.autocast(kind, dtype, enabled=dtype is not None):
            return call(*inputs)

    return guarded


def _device(inputs: Sequence[torch.Tensor]) -> torch.device:
    """Where an operator runs is not part of a graph: where its inputs are."""
    return inputs[0].device if inputs else torch.device("cpu")


def _fill(argument: Argument) -> Fill:
    if isinstance(argument, Ref):
        place = int(argument.name)
        return lambda inputs: inputs[place]
    if isinstance(argument, tuple) and _refers(argument):
        several = [_fill(value) for value in argument]
        return lambda inputs: [fill(inputs) for fill in several]
    value = _value(argument)
    return lambda inputs: value


def _refers(argument: Argument) -> bool:
    if isinstance(argument, tuple):
        return any(map(_refers, argument))
    return isinstance(argument, Ref)


def _value(argument: Argument) -> Any:
    if isinstance(argument, tuple):
        return [_value(part) for part in argument]
    if isinstance(argument, Constant):
        return None if argument.kind == "device" else getattr(torch, argument.value)
    return argument
