"""Sizes as expressions: a graph traced once is evaluated at any batch, tokens and context.

torch.export traces with dynamic shapes, so every dim and every scalar argument is an expression
in the sizes (`batch*tokens`, `tokens//4`). Here they are text, evaluated by a small interpreter:
a graph read from a file scales as well as one just traced. See docs/adr/0003.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from toolkit.errors import FormatError, UsageError, unknown_name
from toolkit.ir.graph import Argument, OpGraph, Tensor

_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Pow: operator.pow,
    ast.FloorDiv: operator.floordiv, ast.Div: operator.truediv, ast.Mod: operator.mod,
    ast.USub: operator.neg,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "max": max, "min": min, "abs": abs, "ceil": math.ceil, "floor": math.floor, "int": int,
    "float": float, "sqrt": math.sqrt, "round": round,
}  # fmt: skip


# The argument in which these are told the shape to make.
SHAPE_ARGUMENT = {
    "aten.view": "size", "aten.reshape": "shape", "aten.expand": "size",
    "aten._unsafe_view": "size",
}  # fmt: skip
_RESHAPES = frozenset({"aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten"})


@dataclass(frozen=True)
class Size:
    """A dim or scalar that depends on the sizes, as text over their names: `batch*tokens`."""

    expression: str


@dataclass(frozen=True)
class Scaling:
    """What of a graph depends on its sizes; everything not listed is fixed."""

    bounds: Mapping[str, tuple[int, int | None]]  # size -> smallest and largest value
    shapes: Mapping[str, tuple[int | Size, ...]]  # tensor -> shape, where some dim varies
    arguments: Mapping[str, Mapping[str, Argument]]  # op -> its arguments that vary


@lru_cache(maxsize=65536)
def _parsed(expression: str) -> ast.expr:
    try:
        return ast.parse(expression, mode="eval").body
    except SyntaxError as error:
        raise FormatError(f"{expression!r} is not a size expression") from error


def evaluate(expression: str, sizes: Mapping[str, int]) -> int | float:
    """Return the value of a size expression.

    >>> evaluate("batch*(tokens//4) + 1", {"batch": 2, "tokens": 16})
    9
    """

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return node.value
        if isinstance(node, ast.Name) and node.id in sizes:
            return sizes[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.operand))
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in _FUNCTIONS
        ):
            return _FUNCTIONS[node.func.id](*(value(part) for part in node.args))
        raise FormatError(f"size expression {expression!r}: cannot evaluate {ast.unparse(node)!r}")

    return value(_parsed(expression))


class Evaluator:
    """Evaluates sizes inside shapes and arguments, each distinct expression once."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self._known: dict[str, int | float] = {}

    def __call__(self, value: Argument) -> Argument:
        if isinstance(value, Size):
            if value.expression not in self._known:
                self._known[value.expression] = evaluate(value.expression, self.sizes)
            return self._known[value.expression]
        if isinstance(value, tuple):
            return tuple(self(part) for part in value)
        return value


def at(graph: OpGraph, sizes: Mapping[str, int]) -> OpGraph:
    """Return `graph` evaluated at `sizes`; those not named keep their value.

    `tokens` are a sequence's new (query) tokens and `context` the keys they attend to, which is
    `tokens` unless given: naming it makes the graph that of a model with a cache (see context.py).
    """
    if "context" in sizes and "context" not in graph.sizes and "tokens" in graph.sizes:
        if sizes["context"] == sizes.get("tokens", graph.sizes["tokens"]):
            sizes = {name: value for name, value in sizes.items() if name != "context"}
        else:
            from toolkit.ir import context

            graph = context.with_cache(graph)
    wanted = _checked(graph, sizes)
    if wanted.get("context", wanted.get("tokens", 0)) < wanted.get("tokens", 0):
        raise UsageError(
            f"context={wanted['context']} is less than tokens={wanted['tokens']}",
            remedy="the context counts the new tokens too",
        )
    return graph if wanted == dict(graph.sizes) else evaluated(graph, wanted)


def evaluated(graph: OpGraph, wanted: Mapping[str, int]) -> OpGraph:
    """Evaluate every varying shape and argument of `graph` at `wanted`.

    Raises UsageError where the sizes do not fit (windows that do not tile an image).
    """
    scaling = graph.scaling
    assert scaling is not None
    evaluate_all = Evaluator(wanted)
    tensors: dict[str, Tensor] = dict(graph.tensors)
    for name, shape in scaling.shapes.items():
        tensors[name] = replace(tensors[name], shape=evaluate_all(shape))
    ops = tuple(
        replace(op, arguments={**op.arguments, **{
            key: evaluate_all(value) for key, value in scaling.arguments[op.name].items()
        }})
        if op.name in scaling.arguments else op
        for op in graph.ops
    )  # fmt: skip
    made = replace(graph, ops=ops, tensors=tensors, sizes=dict(wanted))
    _check_views(made)
    return made


def _check_views(graph: OpGraph) -> None:
    """A size that rounds down somewhere shows where as many elements must come out as go in."""
    for op in graph.ops:
        if op.kind not in _RESHAPES:
            continue
        before, after = graph.tensors[op.inputs[0]], graph.tensors[op.outputs[0]]
        asked = op.arguments.get(SHAPE_ARGUMENT.get(op.kind, ""), after.shape)
        if before.numel != after.numel or asked != after.shape:
            sizes = ", ".join(f"{name}={value}" for name, value in graph.sizes.items())
            raise UsageError(
                f"{graph.name} does not fit {sizes}: {op.name} ({op.source}) would make "
                f"{asked} of {before.shape}"
            )


def _checked(graph: OpGraph, sizes: Mapping[str, int]) -> dict[str, int]:
    wanted = dict(graph.sizes)
    bounds = graph.scaling.bounds if graph.scaling else {}
    for name, value in sizes.items():
        if name not in graph.sizes and name not in graph.fixed:
            raise unknown_name(f"size of {graph.name}", name, {*graph.sizes, *graph.fixed})
        if name in graph.fixed:
            if value == graph.sizes.get(name):
                continue
            raise UsageError(
                f"{graph.name} cannot be evaluated at {name}={value}: {graph.fixed[name]}",
                remedy=f"trace the model again at {name}={value}",
            )
        low, high = bounds.get(name, (1, None))
        if value < low or (high is not None and value > high):
            reach = f"{low} to {high}" if high is not None else f"{low} or more"
            raise UsageError(
                f"{name}={value} is outside what {graph.name} can be evaluated at ({reach})"
            )
        wanted[name] = value
    return wanted
