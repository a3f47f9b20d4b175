"""From torch.export's symbolic sizes to size expressions in `batch`, `tokens` and the like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch

from toolkit.errors import UsageError
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
