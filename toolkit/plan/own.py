"""A plan of one's own: a Program, written with the three primitives, as a Plan that runs.

A Program says for one microbatch which part of which operator every device runs. A Plan says the
same by mesh axes: here the axes are found along which the parts lie, and the stages where the
devices change. What a Plan has no words for is refused by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from toolkit.errors import UsageError
from toolkit.hardware import Cluster
from toolkit.ir.graph import Op
from toolkit.plan.order import simple
from toolkit.plan.plan import Axis, Placement, Plan, Split, Stage
from toolkit.plan.program import Part, Program, pattern
from toolkit.plan.program.part import Split as Divide
from toolkit.plan.program.part import divide
from toolkit.plan.subject import Subject

_NAME = "own"
_SHOWN = 3

Write = Callable[[Program], None]


def plan(
    write: Write,
    subject: Subject,
    cluster: Cluster,
    *,
    microbatches: int = 1,
    recompute: bool = False,
) -> Plan:
    """Return what `write` does with a Program over one microbatch's graph, as a plan.

    Devices 0 .. n-1 of the program are the plan's ranks; stages run 1F1B. With `recompute` every
    block keeps only its inputs. Raises UsageError where the program cannot run, or no plan can say
    it: devices that are not counted from 0, parts that do not lie regularly over them, stages that
    do not begin where a module does.
    """
    micro = subject.graph.at(batch=subject.divided(1, microbatches))
    program = Program(micro)
    write(program)
    program.freeze()  # it can run at all
    stages = _stages(program)
    width = len(stages[0].devices)
    cuts = _cuts(program, stages, width)
    _check_order(program, stages)
    split = (Axis("context", cuts.context), Axis("tensor", width // cuts.context))
    axes = (Axis("pipeline", len(stages)), Axis("data", 1), *split)
    return Plan(
        strategy=_NAME,
        provenance=subject.provenance(cluster),
        mesh=tuple(axis for axis in axes if axis.size > 1 or axis.name == "data"),
        placements=tuple(Placement(path, "data", "replicate") for path in (*subject.blocks, "")),
        splits=tuple(_splits(program, cuts)),
        stages=tuple(
            Stage(one.begins_at, _blocks(subject, one), (position,))
            for position, one in enumerate(stages)
        ),
        microbatches=microbatches,
        schedule="1f1b",
        order=simple.one_f_one_b(len(stages), microbatches).rows,
        recompute=subject.blocks if recompute else (),
    )


# Stages --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stretch:
    """Operators that follow each other and lie on the same devices."""

    ops: tuple[Op, ...]
    devices: tuple[int, ...]
    begins_at: str | None


def _stages(program: Program) -> tuple[_Stretch, ...]:
    """The stretches of the graph by device. Operators of no parameter (positions, masks) lie where
    they are read, wherever the program put them.
    """
    learned = program.graph.learned
    ops = [op for op in program.graph.ops if learned.intersection(op.outputs)]
    found: list[_Stretch] = []
    for devices, several in itertools.groupby(ops, key=lambda op: _devices(program, op)):
        stretch = tuple(several)
        begins_at = _entry(program, found[-1].ops[-1], stretch[0]) if found else None
        found.append(_Stretch(stretch, devices, begins_at))
    width = len(found[0].devices)
    for position, one in enumerate(found):
        wanted = tuple(range(position * width, (position + 1) * width))
        if one.devices != wanted:
            raise UsageError(
                f"stage {position}, which begins with {one.ops[0].name}, is on devices "
                f"{_listed(one.devices)}; a plan has it on {_listed(wanted)}",
                remedy="give every stage as many devices, counted on from the stage before, and "
                "every operator of it all of them (replicate what is not split)",
            )
    return tuple(found)


def _devices(program: Program, op: Op) -> tuple[int, ...]:
    return tuple(sorted({program.device(part) for part in program.ops(op.name)}))


def _entry(program: Program, before: Op, first: Op) -> str:
    """The outermost module that is entered between two operators."""
    path = first.module_path
    steps = path.split(".") if path else []
    for count in range(1, len(steps) + 1):
        module = ".".join(steps[:count])
        if before.module_path != module and not before.module_path.startswith(f"{module}."):
            return module
    raise UsageError(
        f"a stage begins with {first.name}, inside the module that {before.name} is in",
        remedy="begin a stage where the model enters a module",
    )


def _blocks(subject: Subject, stretch: _Stretch) -> tuple[str, ...]:
    paths = dict.fromkeys(op.module_path for op in stretch.ops)
    return tuple(
        block
        for block in subject.blocks
        if any(path == block or path.startswith(f"{block}.") for path in paths)
    )


# Splits --------------------------------------------------------------------------------------


class _Lay(NamedTuple):
    """Along which dims an operator is split over context and tensor, and in how many co-shards."""

    context: str | None
    tensor: str | None
    shard: str | None
    num_shards: int


@dataclass(frozen=True)
class _Cuts:
    """The size of the context axis, and how each operator lies."""

    context: int
    lays: Mapping[str, _Lay]


def _cuts(program: Program, stages: Sequence[_Stretch], width: int) -> _Cuts:
    """Find the axes: the first grid of a stage's devices along which all parts lie regularly."""
    refused = ""
    for context in (n for n in range(1, width + 1) if width % n == 0):
        found = {}
        for op, stage in _placed(stages):
            lay = _lay(program, op, stage.devices, context)
            if lay is None:
                refused = refused or op.name
                break
            found[op.name] = lay
        else:
            return _Cuts(context, found)
    parts = [f"{part.name} on {program.device(part)}" for part in program.ops(refused)]
    raise UsageError(
        f"no plan says how {refused} lies on its devices: {_listed(parts)}",
        remedy="split every operator over all devices of its stage in order, along one dim or "
        "two (the outer first), or replicate it there",
    )


def _placed(stages: Iterable[_Stretch]) -> Iterator[tuple[Op, _Stretch]]:
    for stage in stages:
        for op in stage.ops:
            yield op, stage


def _lay(program: Program, op: Op, devices: Sequence[int], context: int) -> _Lay | None:
    """How an operator's parts lie in a grid of (context, the rest); None when they do not."""
    parts = program.ops(op.name)
    by_device: dict[int, list[Part]] = {device: [] for device in devices}
    for part in parts:
        by_device[program.device(part)].append(part)
    counts = {len(several) for several in by_device.values()}
    if len(counts) != 1:
        return None
    num = counts.pop()
    names = [None, *dict.fromkeys(name for part in parts for name in part.region)]
    sizes = (context, len(devices) // context)
    for outer, inner, shard in itertools.product(names, names, names if num > 1 else [None]):
        alone = (outer and sizes[0] == 1) or (inner and sizes[1] == 1)
        if alone or (num > 1 and shard is None):
            continue
        wanted = _grid(program, op, (outer, inner), sizes, shard, num)
        given = [[(p.region, p.chunk) for p in by_device[device]] for device in devices]
        if wanted == given:
            return _Lay(outer, inner, shard, num)
    return None


def _grid(
    program: Program,
    op: Op,
    dims: tuple[str | None, str | None],
    sizes: tuple[int, int],
    shard: str | None,
    num: int,
) -> list[list[tuple[object, object]]] | None:
    """What each device of the grid has when parts are divided along these dims, outer first."""
    annotation = program.annotation(op.name)
    made = [Part(op.name)]
    try:
        for dim, size in zip(dims, sizes, strict=True):
            algorithm = Divide(dim, size) if dim is not None else None
            made = [
                part
                for one in made
                for part in (divide(one, annotation, algorithm) if algorithm else [one] * size)
            ]
        several = [
            divide(one, annotation, Divide(shard, num)) if shard is not None else (one,)
            for one in made
        ]
    except UsageError:
        return None
    return [[(part.region, part.chunk) for part in parts] for parts in several]


def _splits(program: Program, cuts: _Cuts) -> Iterator[Split]:
    def along(dim: Callable[[_Lay], str | None]) -> dict[str, str]:
        return {op: name for op, lay in cuts.lays.items() if (name := dim(lay)) is not None}

    graph = program.graph
    yield from pattern.splits(graph, along(lambda lay: lay.context), "context")
    yield from pattern.splits(graph, along(lambda lay: lay.tensor), "tensor")
    for num in sorted({lay.num_shards for lay in cuts.lays.values()}):
        shards = along(lambda lay, num=num: lay.shard if lay.num_shards == num else None)  # type: ignore[misc]
        yield from pattern.splits(graph, shards, None, num)


# Order ---------------------------------------------------------------------------------------


def _check_order(program: Program, stages: Sequence[_Stretch]) -> None:
    """Refuse an op-order that a plan's ranks do not keep anyway: each runs its operators in the
    model's order, co-shards one after another.
    """
    place = {op.name: index for index, op in enumerate(program.graph.ops)}
    for first, then in program.ordered():
        same = program.device(first) == program.device(then)
        if same and (place[first.op] <= place[then.op] or _shards(program, first, then)):
            continue
        raise UsageError(
            f"a plan does not say that {first.name} on device {program.device(first)} runs before "
            f"{then.name} on device {program.device(then)}",
            remedy="leave this order out: ranks run operators in the model's order, and wait for "
            "what they read",
        )


def _shards(program: Program, first: Part, then: Part) -> bool:
    """Whether both are co-shards, an earlier and a later one."""
    return bool(program.recomputed(first) and program.recomputed(then))


def _listed(things: Sequence[object]) -> str:
    more = ", ..." if len(things) > _SHOWN else ""
    return ", ".join(map(str, things[:_SHOWN])) + more
