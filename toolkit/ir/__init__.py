"""A traced model as a graph of operators, each with its work.

`trace(module, args, kwargs, name=...)` gives an `OpGraph`; `formulas.work`, `backward.work`,
`backward.saved` and `dims.annotation` say what its operators cost and how they split.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.ir.graph import Constant, Op, OpGraph, Ref, Tensor

if TYPE_CHECKING:
    from toolkit.ir.tracer import trace, trace_model

__all__ = ["Constant", "Op", "OpGraph", "Ref", "Tensor", "trace", "trace_model"]


def __getattr__(name: str) -> Any:
    # Tracing imports torch; reading and evaluating a graph does not need it.
    if name in ("trace", "trace_model"):
        from toolkit.ir import tracer

        return getattr(tracer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
