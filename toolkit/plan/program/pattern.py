"""Dims of many operators in few words: splits by pattern, the blocks of a model as one."""

from __future__ import annotations

import re
from collections.abc import Mapping

from toolkit.ir.graph import OpGraph
from toolkit.plan.plan import AxisName, Split


def splits(
    graph: OpGraph, dims: Mapping[str, str], axis: AxisName | None, parts: int = 0
) -> tuple[Split, ...]:
    """Return splits that say of every operator in `dims` along which dim it is split.

    Operators whose names differ in numbers of modules only become one pattern, where all that the
    pattern matches are split alike.
    """
    matched: dict[str, list[str]] = {}
    for op in graph.ops:
        matched.setdefault(_starred(op.name), []).append(op.name)
    found: dict[tuple[str, str], None] = {}
    for name, dim in dims.items():
        pattern = _starred(name)
        alike = all(dims.get(other) == dim for other in matched[pattern])
        found[pattern if alike else name, dim] = None
    return tuple(Split(ops, dim, axis, parts) for ops, dim in found)


def _starred(name: str) -> str:
    """The name with a star for every step of its module path that is a number.

    >>> _starred("blocks.12.ffn.up:linear.2")
    'blocks.*.ffn.up:linear.2'
    """
    path, colon, kind = name.partition(":")
    return ".".join("*" if re.fullmatch(r"\d+", step) else step for step in path.split(".")) + (
        colon + kind
    )
