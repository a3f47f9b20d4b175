"""From torch.export's symbolic sizes to size expressions in `batch`, `tokens` and the like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch

from toolkit.errors import UsageError
from toolkit.ir.capture import Captured, places
from toolkit.ir.scale import Size

# sympy function (torch has its own for integer arithmetic) -> how it is written
_CALLS: dict[str, Callable[..., str]] = {
    "FloorDiv": lambda a, b: f"({a})//({b})",
    "CleanDiv": lambda a, b: f"({a})//({b})",
    "CeilDiv": lambda a, b: f"-(-({a})//({b}))",
    "Mod": lambda a, b: f"({a})%({b})",
    "PythonMod": lambda a, b: f"({a})%({b})",
    "ModularIndexing": lambda a, b, c: f"(({a})//({b}))%({c})",
    "Max": lambda *parts: f"max({', '.join(parts)})",
    "Min": lambda *parts: f"min({', '.join(parts)})",
    "PowByNatural": lambda a, b: f"({a})**({b})",
    "FloatPow": lambda a, b: f"({a})**({b})",
    "FloatTrueDiv": lambda a, b: f"({a})/({b})",
    "IntTrueDiv": lambda a, b: f"({a})/({b})",
    "CeilToInt": lambda a: f"ceil({a})",
    "FloorToInt": lambda a: f"floor({a})",
    "TruncToInt": lambda a: f"int({a})",
    "RoundToInt": lambda a: f"round({a})",
    "ToFloat": lambda a: f"float({a})",
    "Identity": lambda a: f"({a})",
    "OpaqueUnaryFn_sqrt": lambda a: f"sqrt({a})",
}


class Symbols:
    """Names torch's symbols after sizes, and writes symbolic values as `Size` expressions."""

    def __init__(self, names: Mapping[sympy.Symbol, str]) -> None:
        self._names = names
        self._known: dict[sympy.Expr, str] = {}

    def __call__(self, value: Any) -> Any:
        """Return a Python scalar as it is, a symbolic one as a Size (or number if it is none)."""
        if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return value
        expr = value.node.expr
        if isinstance(value, torch.SymBool):
            # A condition export kept as a value: it held for the traced sizes.
            return bool(value.node.hint)
        if expr.is_number:
            return int(expr) if isinstance(value, torch.SymInt) else float(expr)
        if expr not in self._known:
            self._known[expr] = self._write(expr)
        return Size(self._known[expr])

    def hint(self, value: Any) -> Any:
        """Return the value a symbolic scalar had when traced."""
        symbolic = isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
        return value.node.hint if symbolic else value

    def _write(self, expr: Any) -> str:
        if isinstance(expr, sympy.Symbol):
            if expr not in self._names:
                raise UsageError(
                    f"a shape depends on the data ({expr})",
                    remedy="such operators (nonzero, unique, boolean indexing) cannot be planned",
                )
            return self._names[expr]
        if isinstance(expr, sympy.Integer):
            return str(int(expr))
        if expr.is_number:
            return repr(float(expr))
        parts = [self._write(part) for part in expr.args]
        if isinstance(expr, sympy.Add):
            return "(" + " + ".join(parts) + ")"
        if isinstance(expr, sympy.Mul):
            return "*".join(parts)
        if isinstance(expr, sympy.Pow):
            return f"({parts[0]})**({parts[1]})"
        name = type(expr).__name__
        if name not in _CALLS:
            raise UsageError(f"a shape uses {name}, which size expressions do not know: {expr}")
        return f"({_CALLS[name](*parts)})"


def named(
    captured: Captured, fixed: dict[str, str]
) -> tuple[Symbols, dict[str, tuple[int, int | None]]]:
    """Name export's symbols after the sizes; what export fixed goes to `fixed` with the reason."""
    program = captured.program
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    users = nodes[len(nodes) - len(captured.inputs) :]
    shapes = {name: node.meta["val"].shape
              for name, node in zip(captured.inputs, users, strict=True)
              if isinstance(node.meta.get("val"), torch.Tensor)}  # fmt: skip
    names: dict[Any, str] = {}
    bounds: dict[str, tuple[int, int | None]] = {}
    for size, dims in captured.axes.items():
        if size in fixed:
            continue
        found = [shapes[name][dim] for name, dim in places(dims)]
        symbols = [value.node.expr for value in found if isinstance(value, torch.SymInt)]
        if len(symbols) < len(found) or not all(symbol.is_Symbol for symbol in symbols):
            fixed[size] = "the model's code depends on its value, so torch.export fixed it"
            # Other inputs may still carry a symbol for it: as good as the number.
        low, high = 1, None
        for symbol in symbols:
            if symbol.is_Symbol:
                names[symbol] = size
                low, high = _narrowed((low, high), program.range_constraints.get(symbol))
        if size not in fixed:
            bounds[size] = (low, high)
    return Symbols(names), bounds


def _narrowed(bounds: tuple[int, int | None], constraint: Any) -> tuple[int, int | None]:
    low, high = bounds
    if constraint is None:
        return bounds
    # Export says "2 or more" of every size it keeps free; 1 evaluates as well.
    if int(constraint.lower) > 2:
        low = max(low, int(constraint.lower))
    if isinstance(constraint.upper, sympy.Integer) and int(constraint.upper) < 2**31:
        high = min(high or int(constraint.upper), int(constraint.upper))
    return low, high
