"""A plan written out: which part of which operator every rank runs, for one microbatch.

All ranks of a stage run its operators in the same order, each its own parts. Ranks are numbered as
in the plan's mesh, those of the first replica: the others do the same on other samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from toolkit.errors import UsageError
from toolkit.ir.dims import Annotation
from toolkit.ir.graph import Op, OpGraph
from toolkit.plan.plan import AxisName, Plan, Stage
from toolkit.plan.program import part as parts
from toolkit.plan.program import rules, select
from toolkit.plan.program.frozen import FrozenProgram, SubOp
from toolkit.plan.program.part import Part
from toolkit.plan.tensors import Mask, PTensor, VTensor

# What a part reads of which tensors, and makes of each output.
_Masks = tuple[tuple[tuple[str, Mask], ...], tuple[Mask, ...]]

# The axes that one replica lies along, outermost first.
AXES: tuple[AxisName, ...] = ("pipeline", "context", "tensor")


@dataclass(frozen=True)
class Cut:
    """An operator is split along identifier `dim` over `axis`, or co-sharded in `parts`."""

    axis: AxisName | None
    dim: str
    parts: int = 0


@dataclass(frozen=True)
class Written:
    """`parts[stage][op][rank]` are the parts of `op` that `rank` runs in a stage: one, or the
    co-shards in their order. `graph` has the shapes of one microbatch.
    """

    plan: Plan
    graph: OpGraph
    ops: tuple[tuple[Op, ...], ...]
    parts: tuple[Mapping[str, Mapping[int, tuple[Part, ...]]], ...]
    annotations: Mapping[str, Annotation]
    co_shards: Mapping[str, int]

    @cached_property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each stage."""
        return tuple(stage_ranks(self.plan, stage) for stage in self.plan.stages)

    @cached_property
    def replica(self) -> tuple[int, ...]:
        """All ranks of the replica."""
        return tuple(sorted(set(itertools.chain.from_iterable(self.ranks))))

    def held_by(self, rank: int) -> tuple[int, ...]:
        """Return the stages a rank takes part in."""
        return tuple(stage for stage, ranks in enumerate(self.ranks) if rank in ranks)

    def works(self, stage: int, op: str) -> Mapping[str, frozenset[int]]:
        """Return what is done of an operator -> the ranks that do it (replicas)."""
        key = stage, op
        if key not in self._works:
            found: dict[str, set[int]] = {}
            for rank, several in self.parts[stage][op].items():
                for one in several:
                    found.setdefault(one.work, set()).add(rank)
            self._works[key] = {work: frozenset(ranks) for work, ranks in found.items()}
        return self._works[key]

    @cached_property
    def _works(self) -> dict[tuple[int, str], Mapping[str, frozenset[int]]]:
        return {}

    def reads(self, part: Part) -> tuple[tuple[str, Mask], ...]:
        """Return what a part reads: tensor and mask, in the order of Part.reads."""
        return self._masks(part)[0]

    def outputs(self, part: Part) -> tuple[Mask, ...]:
        """Return what a part makes of each output."""
        return self._masks(part)[1]

    @cached_property
    def _known(self) -> dict[tuple[str, str], _Masks]:
        return {}

    def _masks(self, part: Part) -> _Masks:
        key = part.op, part.work
        if key not in self._known:
            found, names = self.annotations[part.op], self.graph.op(part.op).inputs
            reads = tuple((names[place], mask) for place, mask in part.reads(found))
            self._known[key] = reads, part.outputs(found)
        return self._known[key]

    def logical(self, name: str) -> PTensor:
        """Return a tensor as exchanges see it; what a step costs is that of the plan's dtype."""
        tensor = self.graph.tensors[name]
        dtype = self.plan.provenance.dtype if tensor.is_floating else tensor.dtype
        return PTensor(name, tensor.shape, dtype)

    def frozen(self) -> FrozenProgram:
        """Return the program of one microbatch as checked data; see program.frozen."""
        from toolkit.plan.program import check

        made = FrozenProgram(
            name=self.graph.name,
            digest=self.graph.digest,
            sub_ops=tuple(self._sub_ops()),
            order=(),
            sources=tuple(t.name for t in self.graph.tensors.values() if t.role != "activation"),
            weights=tuple(t.name for t in self.graph.parameters() if t.requires_grad),
            outputs=self.graph.outputs,
        )
        check.check(made)
        return made

    def _sub_ops(self) -> Iterator[SubOp]:
        counts: dict[str, int] = {}
        for stage, ops in enumerate(self.ops):
            for op in ops:
                for rank, several in self.parts[stage][op.name].items():
                    for index, one in enumerate(several):
                        number = counts.get(one.work, 0)
                        counts[one.work] = number + 1
                        named = replace(one, replica=(number,)) if number else one
                        co = f"{stage} {op.name} {index}/{len(several)}"
                        yield SubOp(
                            named.name, op.name, rank,
                            self._views(self.reads(one), rank, one.work),
                            self._views(
                                zip(op.outputs, self.outputs(one), strict=True), rank, one.work
                            ),
                            dict(one.region), op.name in self.graph.differentiated,
                            co if len(several) > 1 else "",
                        )  # fmt: skip

    def _views(self, seen: Iterable[tuple[str, Mask]], rank: int, work: str) -> tuple[VTensor, ...]:
        return tuple(VTensor(self.logical(name), mask, rank, work) for name, mask in seen)


def write(plan: Plan, graph: OpGraph) -> Written:
    """Return what each rank runs of `graph` (any batch; the plan's microbatch is taken of it).

    Raises UsageError for stages, splits or placements that do not fit the graph.
    """
    if graph.sizes.get("batch") != plan.microbatch:
        graph = graph.at(batch=plan.microbatch)
    annotations = {op.name: rules.annotation(op, graph) for op in graph.ops}
    cuts = all_cuts(plan, graph, annotations)
    stages = stage_ops(plan, graph)
    found = tuple(
        {
            op.name: _parts(plan, stage, op, annotations[op.name], cuts.get(op.name, ()))
            for op in ops
        }
        for stage, ops in zip(plan.stages, stages, strict=True)
    )
    co_shards = {
        name: cut.parts for name, several in cuts.items() for cut in several if cut.axis is None
    }
    return Written(plan, graph, stages, found, annotations, co_shards)


def stage_ranks(plan: Plan, stage: Stage) -> tuple[int, ...]:
    """Return the ranks of a stage in the first replica, row-major."""
    return tuple(
        position * plan.stride("pipeline")
        + context * plan.stride("context")
        + tensor * plan.stride("tensor")
        for position in stage.devices
        for context in range(plan.size("context"))
        for tensor in range(plan.size("tensor"))
    )


def _parts(
    plan: Plan, stage: Stage, op: Op, found: Annotation, cuts: Sequence[Cut]
) -> dict[int, tuple[Part, ...]]:
    """The parts of one operator by rank; outer axes divide first, co-shards last."""
    by_axis = {cut.axis: cut for cut in cuts}
    made = {}
    for rank in stage_ranks(plan, stage):
        one = Part(op.name)
        for axis in AXES:
            cut = by_axis.get(axis)
            if axis == "pipeline":
                num = len(stage.devices)
                index = stage.devices.index(rank // plan.stride(axis) % plan.size(axis))
            else:
                num = plan.size(axis)
                index = rank // plan.stride(axis) % num
            if cut is not None and num > 1:
                one = parts.divide(one, found, parts.Split(cut.dim, num))[index]
        several: tuple[Part, ...] = (one,)
        if None in by_axis:
            cut = by_axis[None]
            several = parts.divide(one, found, parts.Split(cut.dim, cut.parts))
        made[rank] = several
    return made


# Stages --------------------------------------------------------------------------------------


def stage_starts(stages: Sequence[Stage], graph: OpGraph) -> tuple[int, ...]:
    """Return the place of the first operator of each stage.

    Stages follow each other, so a module that runs several times may begin one each time.
    """
    starts: list[int] = []
    for stage in stages:
        if stage.begins_at is None:
            starts.append(0)
            continue
        after = starts[-1] if starts else -1
        entry = next(
            (
                place
                for place in range(after + 1, len(graph.ops))
                if _within(graph.ops[place], stage.begins_at)
                and not _within(graph.ops[place - 1], stage.begins_at)
            ),
            None,
        )
        if entry is None:
            raise UsageError(
                f"no operator of {graph.name} enters {stage.begins_at!r} after the stage before",
                remedy="name stages in the order the model runs them",
            )
        starts.append(entry)
    if not starts or starts[0] != 0:
        raise UsageError("the first stage begins at the model's start (begins_at None)")
    return tuple(starts)


def _within(op: Op, path: str) -> bool:
    return op.module_path == path or op.module_path.startswith(f"{path}.")


def stage_ops(plan: Plan, graph: OpGraph) -> tuple[tuple[Op, ...], ...]:
    """Return the operators of each stage, in order.

    What depends on no parameter (positions, masks) is not sent but made again where it is read.
    """
    starts = (*stage_starts(plan.stages, graph), len(graph.ops))
    learned = graph.learned
    place = {op.name: index for index, op in enumerate(graph.ops)}
    found = []
    for low, high in itertools.pairwise(starts):
        wanted = [op.name for op in graph.ops[low:high]]
        chosen = set(wanted)
        while wanted:
            for name in graph.op(wanted.pop()).inputs:
                maker = graph.producer.get(name)
                if maker is None or name in learned or maker.name in chosen:
                    continue
                if place[maker.name] < low:
                    chosen.add(maker.name)
                    wanted.append(maker.name)
        found.append(tuple(op for op in graph.ops if op.name in chosen))
    return tuple(found)


# Splits --------------------------------------------------------------------------------------


def all_cuts(
    plan: Plan, graph: OpGraph, annotations: Mapping[str, Annotation]
) -> dict[str, list[Cut]]:
    """Return how each operator is split: by the plan's splits, and by its tensor placements."""
    found: dict[str, list[Cut]] = {}

    def add(op: str, cut: Cut) -> None:
        several = found.setdefault(op, [])
        before = next((one for one in several if one.axis == cut.axis), None)
        if before is None:
            several.append(cut)
        elif before != cut:
            where = f"over {cut.axis}" if cut.axis else "as co-shards"
            raise UsageError(f"{op} is split {where} along {before.dim} and along {cut.dim}")

    for split in plan.splits:
        if split.axis not in (*AXES, None):
            raise UsageError(f"operators are not split over the {split.axis} axis ({split.ops})")
        if split.axis is None and split.parts < 1:
            raise UsageError(f"the co-shard of {split.ops} does not say in how many parts")
        for op in select.ops(graph, [split.ops]):
            name = parts.identifier(split.dim, op.name, annotations[op.name])
            add(op.name, Cut(split.axis, name, split.parts if split.axis is None else 0))
    for name, dim in _features(plan, graph, annotations).items():
        add(name, Cut("tensor", dim))
    taken = {name for name, several in found.items() if any(c.axis == "tensor" for c in several)}
    for name, dim in _sequence(plan, graph, annotations).items():
        if name not in taken:
            add(name, Cut("tensor", dim))
    return found


def _features(plan: Plan, graph: OpGraph, annotations: Mapping[str, Annotation]) -> dict[str, str]:
    """Column and row placements as splits: columns' features are followed to the rows."""
    columns = plan.placed("column")
    if not columns:
        return {}
    starts = [op.name for op in graph.ops if op.module_path in columns]
    found = select.flow(graph, lambda op: annotations[op.name], starts, -1)
    ends = [op.name for op in graph.ops if op.module_path in plan.placed("row")]
    missing = [name for name in ends if name not in found]
    if missing:
        raise UsageError(f"the split of columns does not reach {missing[0]}, placed as a row")
    return found


def _sequence(plan: Plan, graph: OpGraph, annotations: Mapping[str, Annotation]) -> dict[str, str]:
    """Sequence placements as splits by tokens."""
    modules = plan.placed("sequence")
    if not modules:
        return {}
    return {
        name: dim
        for name, dim in token_flow(graph, annotations).items()
        if any(_within(graph.op(name), path) for path in modules)
    }


def token_flow(graph: OpGraph, annotations: Mapping[str, Annotation]) -> dict[str, str]:
    """Return operator -> what it calls the dim of tokens, for all that can be split along it."""
    tokens = graph.sizes.get("tokens")
    starts = [
        name
        for name in graph.inputs
        if len(graph.tensors[name].shape) > 1 and graph.tensors[name].shape[1] == tokens
    ]
    if tokens is None or not starts:
        raise UsageError(f"{graph.name} has no dim of tokens to split")
    return select.flow(graph, lambda op: annotations[op.name], starts, 1)
