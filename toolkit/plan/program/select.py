"""Choosing operators: by pattern and kind, and by following a dim through the graph."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from toolkit.errors import UsageError, unknown_name
from toolkit.ir.dims import Annotation
from toolkit.ir.graph import Op, OpGraph

Annotate = Callable[[Op], Annotation]


def ops(graph: OpGraph, patterns: Iterable[str], kind: str = "") -> tuple[Op, ...]:
    """Return the operators that any pattern matches, in execution order; all without patterns.

    A pattern is the name of an operator (`blocks.0.ffn.up:linear`) or the path of a module, which
    stands for everything inside it. `*` matches within one step of a path. `kind` keeps those of a
    kind, "linear" or "aten.linear". Raises UsageError with the nearest match for a pattern or a
    kind that nothing matches.
    """
    found = {op.name for op in graph.ops}
    given = list(patterns)
    if given:
        found = {name for pattern in given for name in _matching(graph, pattern)}
    chosen = tuple(op for op in graph.ops if op.name in found)
    if not kind:
        return chosen
    of_kind = tuple(op for op in chosen if kind in (op.kind, op.kind.partition(".")[2]))
    if not of_kind:
        known = {op.kind.partition(".")[2] for op in chosen}
        raise unknown_name(f"kind of operator among {len(chosen)} of {graph.name}", kind, known)
    return of_kind


def _matching(graph: OpGraph, pattern: str) -> list[str]:
    text = "".join(
        "[^.:]*" if step == "*" else re.escape(step) for step in re.split(r"(\*)", pattern)
    )
    # A module stands for its children and for its own operators.
    wanted = re.compile(text if ":" in pattern else rf"{text}(?:[.:].*)?")
    found = [op.name for op in graph.ops if wanted.fullmatch(op.name)]
    if not found:
        known = {op.name for op in graph.ops} | {path for path in graph.modules if path}
        raise unknown_name(f"operator or module of {graph.name}", pattern, known)
    return found


def flow(
    graph: OpGraph, annotate: Annotate, starts: Iterable[str], dim: int, *, halos: bool = False
) -> dict[str, str]:
    """Follow dim `dim` of some tensors through the graph; return operator -> what it calls the dim.

    `starts` are inputs and parameters by name, or patterns of operators, whose first outputs are
    meant. The dim is followed for as long as it can be split, with a halo only if `halos`: an
    operator that needs it whole is left out, and one that sums over it is the last. Raises
    UsageError for a name that is unknown.
    """
    marked: dict[str, int] = {}
    found: dict[str, str] = {}
    for start in starts:
        for name in _tensors(graph, start):
            rank = len(graph.tensors[name].shape)
            if not -rank <= dim < rank:
                raise UsageError(f"{name} of shape {graph.tensors[name].shape} has no dim {dim}")
            marked[name] = dim % rank
    begun = frozenset(marked)
    for op in graph.ops:
        annotation = annotate(op)
        names = _called(op, annotation, marked, begun)
        known = {*annotation.splittable, *(annotation.with_halo if halos else ())}
        if len(names) != 1 or not names <= known:
            continue
        (found[op.name],) = names
        for name, spec in zip(op.outputs, annotation.outputs, strict=True):
            for index, axis in enumerate(spec):
                if axis and axis[0] == found[op.name]:
                    marked[name] = index
    return found


def _tensors(graph: OpGraph, start: str) -> list[str]:
    sources = [t.name for t in graph.tensors.values() if t.role != "activation"]
    if start in sources:
        return [start]
    try:
        return [op.outputs[0] for op in ops(graph, [start]) if op.outputs]
    except UsageError as error:
        known = [*sources, *(op.name for op in graph.ops), *filter(None, graph.modules)]
        raise unknown_name(f"tensor, operator or module of {graph.name}", start, known) from error


def _called(
    op: Op, annotation: Annotation, marked: Mapping[str, int], begun: frozenset[str]
) -> set[str]:
    """What `op` calls the marked dims of its inputs, and of outputs that the flow begins with."""
    read = zip(op.inputs, annotation.inputs, strict=True)
    made = zip(op.outputs, annotation.outputs, strict=True)
    axes = [spec[marked[name]] for name, spec in read if name in marked]
    axes += [spec[marked[name]] for name, spec in made if name in begun]
    return {annotation.leading(axis) for axis in axes} - {""}
