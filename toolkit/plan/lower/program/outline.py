"""In which pieces a stage's operators run: plain ones, co-sharded regions, and what is run again.

The same on all ranks of a stage. A region is a stretch of co-sharded operators whose parts need
nothing of each other; each part is run again just before its backward. A module that is run again
as a whole keeps only what enters it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from toolkit.errors import UsageError
from toolkit.ir import formulas
from toolkit.ir.graph import Op, OpGraph
from toolkit.plan.lower.program.write import Written

# Their backward needs no value of their forward, so keeping their inputs costs nothing.
_SUMS = frozenset({"aten.add", "aten.sub", "aten.clone", "aten.contiguous", "aten.neg"})


@dataclass(frozen=True)
class Ops:
    """Operators that follow each other."""

    ops: tuple[Op, ...]


@dataclass(frozen=True)
class Region:
    """Co-sharded operators in `parts` parts, after the operators they all share."""

    ops: tuple[Op, ...]
    parts: int


@dataclass(frozen=True)
class Again:
    """What is run again in backward; a region inside it, if there is one, comes last."""

    nodes: tuple[Ops | Region, ...]


Node = Ops | Region | Again


def outline(written: Written, stage: int) -> tuple[Node, ...]:
    """Return the pieces of a stage, in the order they run."""
    found: list[Node] = []
    for path, ops in _spans(written, written.ops[stage]):
        pieces = list(_regions(written, stage, ops))
        found += pieces if path is None else _again(written.graph, pieces)
    return tuple(found)


def _spans(written: Written, ops: Sequence[Op]) -> Iterator[tuple[str | None, tuple[Op, ...]]]:
    """Operators of each module that is run again, and those in between (None)."""
    paths = written.plan.recompute
    runs: list[tuple[str | None, list[Op]]] = []
    for op in ops:
        path = next((p for p in paths if f"{op.module_path}.".startswith(f"{p}.")), None)
        if not runs or runs[-1][0] != path:
            runs.append((path, []))
        runs[-1][1].append(op)
    for path, several in runs:
        learns = any(op.name in written.graph.differentiated for op in several)
        yield path if learns else None, tuple(several)


def _regions(written: Written, stage: int, ops: Sequence[Op]) -> Iterator[Ops | Region]:
    """Divide a stretch at its co-sharded regions; what lies inside one and needs nothing of it
    comes before it.
    """
    plain: list[Op] = []
    region: list[Op] = []
    waiting: list[Op] = []  # after the region's last operator so far, and not of it
    inside: set[str] = set()  # what the region makes

    def close() -> Iterator[Ops | Region]:
        nonlocal plain, region, waiting
        if region:
            if plain:
                yield Ops(tuple(plain))
            yield Region(tuple(region), written.co_shards[region[0].name])
            plain, region, waiting = waiting, [], []
            inside.clear()

    for op in ops:
        num = written.co_shards.get(op.name, 0)
        read = inside.intersection(op.inputs)
        if num > 1:
            joins = not region or written.co_shards[region[0].name] == num
            if region and not (joins and _apart(written, stage, op, read)):
                yield from close()
            if region:
                plain += waiting
                waiting = []
            region.append(op)
            inside.update(op.outputs)
        else:
            if read:
                yield from close()
            (waiting if region else plain).append(op)
    yield from close()
    if plain:
        yield Ops(tuple(plain))


def _apart(written: Written, stage: int, op: Op, read: set[str]) -> bool:
    """Whether each part of `op` needs of the region only what the same part made."""
    for name in read:
        maker = written.graph.producer[name]
        place = maker.outputs.index(name)
        for rank, several in written.parts[stage][op.name].items():
            for one, before in zip(several, written.parts[stage][maker.name][rank], strict=True):
                made = written.outputs(before)[place]
                for input_name, mask in written.reads(one):
                    if input_name == name and mask != made:
                        return False
    return True


def _again(graph: OpGraph, pieces: Sequence[Ops | Region]) -> Iterator[Node]:
    """Run pieces of one module again, a section at a time: each ends with a region, so that
    nothing is run three times. What keeps nothing anyway is left out.
    """
    before: tuple[Op, ...] = ()
    for piece in pieces:
        if isinstance(piece, Ops):
            before = piece.ops
            continue
        light, rest = _light_first(graph, before)
        if light:
            yield Ops(light)
        yield Again((Ops(rest), piece) if rest else (piece,))
        before = ()
    if not before:
        return
    light, rest = ((), before) if len(pieces) == 1 else _light_first(graph, before)
    if light:
        yield Ops(light)
    backwards, middle = _light_first(graph, rest[::-1])
    if middle:
        yield Again((Ops(middle[::-1]),))
    if backwards:
        yield Ops(backwards[::-1])


def _light_first(graph: OpGraph, ops: Sequence[Op]) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """The leading operators whose backward keeps nothing, and the others."""
    count = 0
    while count < len(ops) and is_light(ops[count], graph):
        count += 1
    return tuple(ops[:count]), tuple(ops[count:])


def is_light(op: Op, graph: OpGraph) -> bool:
    """Whether backward of `op` needs no value of its forward."""
    if op.name not in graph.differentiated:
        return False
    return op.kind in _SUMS or formulas.moves_nothing(op, graph)


def check_runs_again(written: Written) -> None:
    """Raise UsageError for a path in the plan's recompute that no operator runs in."""
    for path in written.plan.recompute:
        prefix = f"{path}."
        if not any(f"{op.module_path}.".startswith(prefix) for op in written.graph.ops):
            raise UsageError(f"no operator runs in {path!r}, which is to be recomputed")
