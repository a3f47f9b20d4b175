"""Regions of a block that split together: linears that read one tensor, by output features, and
everything up to the linears that sum over those (Shoeybi et al. 2019, arXiv 1909.08053, section 3).

Found by following dims, so attention written out in products, with biases and masks, is one too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from toolkit.errors import InfeasibleError
from toolkit.ir.dims import Annotation
from toolkit.ir.graph import Op, OpGraph
from toolkit.plan import chain
from toolkit.plan.program import rules

_LINEAR = "aten.linear"


@dataclass(frozen=True)
class Region:
    """Operators that split together -> what each calls the dim. `degree` divides all its sizes."""

    dims: Mapping[str, str]
    degree: int
    begins_at: str


def regions(graph: OpGraph, blocks: Collection[str] | None = None) -> tuple[Region, ...]:
    """Return the regions of these blocks (default: all), in order. Raises InfeasibleError where
    there is none.
    """
    found: list[Region] = []
    for segment in chain.segments(graph):
        if segment.path is not None and (blocks is None or segment.path in blocks):
            found += _in_block(graph, segment.ops)
    if not found:
        raise InfeasibleError(
            f"no linears of {graph.name} can be split by columns and then rows",
            remedy="use data parallelism, FSDP or a pipeline",
        )
    return tuple(found)


def dims(
    graph: OpGraph, degree: int, what: str, blocks: Collection[str] | None = None
) -> dict[str, str]:
    """Return the dims of all regions (of `blocks`), to be split in `degree` parts; `what` names the
    wish.

    Raises InfeasibleError when `degree` does not divide heads or features, saying which do.
    """
    several = regions(graph, blocks)
    largest = math.gcd(*(region.degree for region in several))
    for region in several:
        if region.degree % degree:
            works = ", ".join(str(n) for n in range(1, largest + 1) if largest % n == 0)
            raise InfeasibleError(
                f"{what} {degree} does not divide {region.degree}, what the sizes split from "
                f"{region.begins_at} on have in common (heads or features)",
                remedy=f"use {works}",
            )
    return {name: dim for region in several for name, dim in region.dims.items()}


def _in_block(graph: OpGraph, ops: Sequence[Op]) -> list[Region]:
    annotations = {op.name: rules.annotation(op, graph) for op in ops}
    columns: dict[str, list[Op]] = {}
    for op in ops:
        if op.kind == _LINEAR:
            columns.setdefault(op.inputs[0], []).append(op)
    found: list[Region] = []
    taken: set[str] = set()
    for several in columns.values():
        if any(op.name in taken for op in several):
            continue
        # Of the linears that read a tensor, those whose features go another way are left out.
        for chosen in (several, *([op] for op in several if len(several) > 1)):
            region = _grow(graph, ops, annotations, chosen)
            if region is not None and taken.isdisjoint(region.dims):
                found.append(region)
                taken.update(region.dims)
                break
    return found


def _grow(
    graph: OpGraph,
    ops: Sequence[Op],
    annotations: Mapping[str, Annotation],
    columns: Sequence[Op],
) -> Region | None:
    """Follow the columns' features; None unless all of it ends in sums within the block."""
    split: dict[str, int] = {}  # tensor -> the dim it is split along
    found: dict[str, str] = {}
    begins = {op.name for op in columns}
    sums = False
    for op in ops:
        annotation = annotations[op.name]
        if op.name in begins:
            name = "n"
        else:
            read = [
                (tensor, spec)
                for tensor, spec in zip(op.inputs, annotation.inputs, strict=True)
                if tensor in split
            ]
            if not read:
                continue
            axes = {_leading(spec, split[tensor]) for tensor, spec in read}
            if len(axes) != 1:
                return None
            name = axes.pop()
        if annotation.kinds.get(name, "^") == "^":
            return None
        found[op.name] = name
        if annotation.kinds[name] == "+":
            if any(name in axis for spec in annotation.outputs for axis in spec):
                return None
            sums = sums or op.kind == _LINEAR
            continue
        for tensor, spec in zip(op.outputs, annotation.outputs, strict=True):
            place = next((at for at, axis in enumerate(spec) if axis and axis[0] == name), None)
            if place is not None:
                split[tensor] = place
    _sides(graph, annotations, found, split)
    inside = {op.name for op in ops}
    leaks = any(user.name not in inside for name in split for user in graph.consumers[name])
    if not sums or leaks or not set(split).isdisjoint(graph.outputs):
        return None
    sizes = [annotations[name].sizes[dim] for name, dim in found.items()]
    return Region(found, math.gcd(*sizes), columns[0].module_path)


def _sides(
    graph: OpGraph,
    annotations: Mapping[str, Annotation],
    found: dict[str, str],
    split: dict[str, int],
) -> None:
    """Split what a region reads beside its columns, as a bias made a head at a time, back to where
    it is made, if it is read by the region alone.
    """
    waiting = list(found)
    while waiting:
        op = graph.op(waiting.pop())
        for tensor, spec in zip(op.inputs, annotations[op.name].inputs, strict=True):
            maker = graph.producer.get(tensor)
            place = next((at for at, x in enumerate(spec) if x and x[0] == found[op.name]), None)
            if maker is None or place is None or tensor in split or maker.name not in annotations:
                continue
            axis = annotations[maker.name].outputs[maker.outputs.index(tensor)][place]
            alone = all(user.name in found for user in graph.consumers[tensor])
            if alone and axis and annotations[maker.name].kinds[axis[0]] == "":
                found[maker.name] = axis[0]
                split[tensor] = place
                waiting.append(maker.name)


def _leading(spec: Sequence[tuple[str, ...]], place: int) -> str:
    axis = spec[place]
    return axis[0] if axis else ""
