"""Run an OpGraph with torch, one operator after another: a graph says what its model does.

Slow and plain on purpose. It is how tests prove that tracing lost nothing, that a graph evaluated
at other sizes is right, and that every way of splitting an operator is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from toolkit.errors import ToolkitError, UsageError
from toolkit.ir.graph import Argument, Constant, Op, OpGraph, Ref


def overload(target: str) -> Any:
    """Return the torch operator called `target`, e.g. "aten.add.Tensor"."""
    namespace, name, overload_name = target.split(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), name), overload_name)
    except AttributeError as error:
        raise ToolkitError(f"torch has no operator {target} here") from error


def call(
    op: Op, tensors: Mapping[str, torch.Tensor], arguments: Mapping[str, Argument] | None = None
) -> tuple[torch.Tensor, ...]:
    """Run `op` on `tensors` (by name), with other `arguments` where given; return its outputs."""
    target, args, kwargs = bound(op, tensors, arguments)
    with context(op):
        result = target(*args, **kwargs)
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def bound(
    op: Op, tensors: Mapping[str, torch.Tensor], arguments: Mapping[str, Argument] | None = None
) -> tuple[Any, list[Any], dict[str, Any]]:
    """Return torch's operator for `op`, and its positional and keyword arguments."""
    given = list((arguments or op.arguments).items())
    # Where a graph runs is not part of it: on the tensors' device.
    here = next((tensors[name].device for name in op.inputs), torch.device("cpu"))
    values = [here if name == "device" else _value(value, tensors) for name, value in given]
    args = values[: op.num_positional]
    kwargs = {name: v for (name, _), v in zip(given, values, strict=True)}
    for name, _ in given[: op.num_positional]:
        del kwargs[name]
    return overload(op.target), args, kwargs


@contextlib.contextmanager
def context(op: Op) -> Iterator[None]:
    """Compute gradients, and in which type, as `op` did where it was traced."""
    dtype = getattr(torch, op.autocast) if op.autocast else None
    with (
        torch.set_grad_enabled(torch.is_grad_enabled() and op.grad_enabled),
        torch.autocast("cpu", dtype=dtype, enabled=dtype is not None),
    ):
        yield


def run(graph: OpGraph, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return the graph's outputs for its parameters, buffers, constants and inputs by name."""
    held = dict(tensors)
    missing = [t.name for t in graph.tensors.values() if t.role != "activation"
               and t.name not in held and graph.consumers[t.name]]  # fmt: skip
    if missing:
        raise UsageError(f"{graph.name} needs the tensors {', '.join(missing)}")
    last = {name: op.name for op in graph.ops for name in (*op.inputs, *rewritten(op).values())}
    for op in graph.ops:
        anew = rewritten(op)
        made = iter(call(op, held))
        for name in op.outputs:
            held[name] = held[anew[name]] if name in anew else next(made)
        for name in {*op.inputs, *anew.values()}:
            if last[name] == op.name and name not in graph.outputs:
                del held[name]
    return tuple(held[name] for name in graph.outputs)


def rewritten(op: Op) -> dict[str, str]:
    """What an in-place operator names anew: `op@old` is `old`, whose memory it wrote."""
    return {name: name.partition("@")[2] for name in op.outputs if "@" in name}


def weights(graph: OpGraph, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the module's parameters and buffers under the names they have in `graph`."""
    state = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    return {name: state[name] for name in graph.tensors if name in state}


def _value(argument: Argument, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(argument, Ref):
        return tensors[argument.name]
    if isinstance(argument, tuple):
        return [_value(part, tensors) for part in argument]
    if isinstance(argument, Constant):
        return None if argument.kind == "device" else getattr(torch, argument.value)
    return argument
