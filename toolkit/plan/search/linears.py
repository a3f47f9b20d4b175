"""Known ways to split Linears as layouts of operators: what placements of modules stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from toolkit.errors import InfeasibleError, UsageError
from toolkit.ir.graph import Op
from toolkit.plan import sequence
from toolkit.plan.program import regions as program
from toolkit.plan.program import rules, select
from toolkit.plan.search.block import Segment
from toolkit.plan.search.choice import Dims
from toolkit.plan.search.layouts import R, V, Way
from toolkit.plan.search.stack import Stack
from toolkit.plan.transform import Region


def columns_and_rows(stack: Stack) -> dict[str, Dims] | None:
    """Return the identifiers that Megatron's columns and rows split over the tensor axis, by
    operator of the solved segments; None where the degree divides nothing.
    """
    regions = stack.outline.regions
    return _found(stack, regions) if _divides(stack, _sizes(regions)) else None


def tokens(stack: Stack) -> dict[str, Dims] | None:
    """Return the same with tokens split between the regions; None where they cannot be."""
    dims = columns_and_rows(stack)
    runs = stack.outline.runs
    split = frozenset(name for run in runs for name in run.split)
    lengths = {stack.graph.tensors[name].shape[sequence.TOKENS] for name in split}
    if dims is None or not _divides(stack, lengths):
        return None
    whole = [found.module for run in runs for found in run.inside if found.region is None]
    for segment in stack.segments.values():
        for op in segment.active:
            inside = any(f"{op.module_path}.".startswith(f"{module}.") for module in whole)
            if op.name in dims or inside or not split.intersection(op.outputs):
                continue
            way = _way(segment, op, lambda way: all(m == (sequence.TOKENS,) for m in way.makes))
            if way is None:
                return None
            dims[op.name] = way.dims
    return dims


def heads(stack: Stack) -> dict[str, Dims] | None:
    """Return what splits all of a block's heads and features, however attention is written."""
    found = _heads(stack)
    return None if found is None else {name: (dim,) for name, dim in found.items()}


def _heads(stack: Stack) -> dict[str, str] | None:
    segments = [stack.outline.segments[index] for index in stack.outline.representatives.values()]
    blocks = {segment.path for segment in segments if segment.path is not None}
    try:
        found = program.dims(stack.graph, stack.axes[0].size, "a tensor degree of", blocks)
    except (InfeasibleError, UsageError):
        return None
    active = {op.name for segment in stack.segments.values() for op in segment.active}
    return {name: dim for name, dim in found.items() if name in active}


def heads_and_vocabulary(stack: Stack) -> dict[str, Dims] | None:
    """Return the same with the vocabulary: rows of tables, outputs of the head, and by tokens what
    follows it.
    """
    graph, degree = stack.graph, stack.axes[0].size
    found = _heads(stack)
    if found is None:
        return None
    annotations = {op.name: rules.annotation(op, graph) for op in graph.ops}
    active = [op for segment in stack.segments.values() for op in segment.active]
    outside = {item.kind for item in stack.outline.segments if item.path is None}
    around = {op.name for kind in outside for op in stack.segments[kind].active}
    rows = 0
    for op in active:
        if op.kind == "aten.embedding" and op.name in around:
            table = graph.tensors[op.inputs[0]]
            if table.role == "parameter" and table.shape[0] % degree == 0:
                rows = max(rows, table.shape[0])
                found[op.name] = annotations[op.name].inputs[0][0][0]
    heads = [
        op.name
        for op in active
        if op.kind == "aten.linear"
        and op.name in around
        and graph.tensors[op.inputs[1]].shape[0] == rows
    ]
    for name, dim in select.flow(graph, lambda op: annotations[op.name], heads, 1).items():
        if name in around and annotations[name].sizes[dim] % degree == 0:
            found.setdefault(name, dim)
    found.update(dict.fromkeys(heads, "n"))
    return {op.name: (found[op.name],) for op in active if op.name in found}


def _sizes(regions: tuple[Region, ...]) -> set[int]:
    return {size for region in regions for size in region.sizes}


def _divides(stack: Stack, sizes: set[int]) -> bool:
    """Whether there are such sizes, and the degree divides them all."""
    return bool(sizes) and all(size % stack.axes[0].size == 0 for size in sizes)


def _found(stack: Stack, regions: tuple[Region, ...]) -> dict[str, Dims] | None:
    dims: dict[str, Dims] = {}
    for segment in stack.segments.values():
        by_name = {op.name: op for op in segment.active}
        for region in regions:
            row = stack.graph.producer[region.output].name
            if row not in by_name:
                continue
            for op in segment.active:
                if op.name != row and not any(n in region.dims for n in (*op.inputs, *op.outputs)):
                    continue
                made = V if op.name == row else R
                way = _way(segment, op, _matches(op, region.dims, made))
                if way is None:
                    return None
                dims[op.name] = way.dims
    return dims


def _matches(op: Op, dims: Mapping[str, int], made: int) -> Callable[[Way], bool]:
    """Whether a way slices just the tensors that `dims` says, and makes the others `made`."""

    def matches(way: Way) -> bool:
        reads = zip(op.inputs, way.reads, strict=True)
        makes = zip(op.outputs, way.makes, strict=True)
        return all(layout == (dims.get(name, R),) for name, layout in reads) and all(
            layout == (dims.get(name, made),) for name, layout in makes
        )

    return matches


def _way(segment: Segment, op: Op, wanted: Callable[[Way], bool]) -> Way | None:
    return next((way for way in segment.ways(op) if wanted(way)), None)
