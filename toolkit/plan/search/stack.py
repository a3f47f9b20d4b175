"""The whole chain of segments on one stage's mesh: what is the same is laid out once.

Blocks that repeat are solved first, each kind once and closed in a ring; what lies around them is
solved against what they read and make.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from toolkit.cost.calibration import Calibration
from toolkit.errors import InfeasibleError
from toolkit.hardware import Cluster, Device
from toolkit.ir import backward, fold
from toolkit.ir.graph import OpGraph
from toolkit.plan import chain, recycling, sequence, transform
from toolkit.plan.search.block import Segment
from toolkit.plan.search.choice import Chosen, Cost, Dims, End, Weights
from toolkit.plan.search.layouts import Axis, AxisName, Resharding, share
from toolkit.plan.search.local import Part, Parts, cut_out
from toolkit.plan.subject import Subject

# How far from the best a block's layout under a memory limit may be.
_GAP = 0.01

MaySplit = Callable[[str, str, AxisName], bool]


@dataclass(frozen=True)
class Item:
    """A segment of the chain: its block's path (None outside the blocks), where its operators are
    in the graph, and the number of the kind it is of. `turn` counts the passes through the model.
    """

    path: str | None
    begin: int
    end: int
    kind: int
    turn: int = 0


class Outline:
    """What does not depend on sizes: the chain's segments and their kinds, and who keeps what.

    `items` are the segments that stages are cut from: all, or those of the last pass of a model
    that runs its blocks several times, each after its `earlier` ones.
    """

    def __init__(self, subject: Subject, cluster: Cluster) -> None:
        self.subject = subject
        self.kernels: backward.Kernels = "cpu" if cluster.device(0).kind == "cpu" else "cuda"
        graph = subject.graph
        self.learned = graph.learned
        self.first_keeper = {
            kept.name: kept.ops[0] for kept in backward.saved(graph, kernels=self.kernels)
        }
        segments = chain.segments(graph)
        repeats = recycling.repeats(segments)
        kinds: dict[str, int] = {}
        found: list[Item] = []
        at = turn = 0
        for place, segment in enumerate(segments):
            digest = fold.structure(graph, segment.ops, segment.path or "")
            digest = digest if segment.path is not None else f"{digest} {at}"
            kind = kinds.setdefault(digest, len(kinds))
            turn += place > 0 and repeats[place] < repeats[place - 1]
            found.append(Item(segment.path, at, at + len(segment.ops), kind, turn))
            at += len(segment.ops)
        self.segments = tuple(found)
        self.num_passes = turn + 1
        own = [place for place, other in enumerate(repeats) if place == other]
        self.items = tuple(found[place] for place in own)
        self.earlier = tuple(
            tuple(i for i, other in enumerate(repeats) if other == place and i != place)
            for place in own
        )
        self.original = {
            found[place].kind: found[other].kind
            for place, other in enumerate(repeats)
            if place != other
        }
        self._graphs: dict[int, OpGraph] = {}

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """The paths of the blocks, in the order they run."""
        return tuple(item.path for item in self.items if item.path is not None)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The items that a stage may begin with."""
        blocks = [index for index in range(len(self.items)) if self.is_block(index)]
        return (0, *blocks[1:])

    def is_block(self, index: int) -> bool:
        return self.items[index].path is not None

    def num_blocks(self, begin: int, end: int) -> int:
        """Return how many of the items [begin, end) are blocks."""
        return sum(item.path is not None for item in self.items[begin:end])

    @cached_property
    def regions(self) -> tuple[transform.Region, ...]:
        """Linears that can be split by columns and rows, at some degree; none where one cannot."""
        graph = self.subject.graph
        try:
            return transform.regions(graph, chain.segments(graph), degree=1)
        except InfeasibleError:
            return ()

    @cached_property
    def runs(self) -> tuple[sequence.Run, ...]:
        """Blocks whose tokens can be split between the regions; none where one cannot."""
        try:
            return sequence.runs(self.subject.graph, self.regions, degree=1)
        except InfeasibleError:
            return ()

    def graph(self, num_samples: int) -> OpGraph:
        """Return the graph of one microbatch."""
        if num_samples not in self._graphs:
            self._graphs[num_samples] = self.subject.graph.at(batch=num_samples)
        return self._graphs[num_samples]

    @cached_property
    def representatives(self) -> dict[int, int]:
        """Kind -> the segment that is solved: one that follows its own copy, if there is one."""
        found: dict[int, int] = {}
        for index, item in enumerate(self.segments):
            follows = index > 0 and self.segments[index - 1].kind == item.kind
            if item.kind not in found or (follows and not self.follows(found[item.kind])):
                found[item.kind] = index
        return found

    def follows(self, index: int) -> bool:
        """Whether a segment comes right after one of its own kind."""
        return index > 0 and self.segments[index - 1].kind == self.segments[index].kind

    def siblings(self, item: Item) -> list[Item]:
        """Return the blocks of the same list that run in the same pass, `item` among them."""
        assert item.path is not None
        parent = item.path.rpartition(".")[0]
        return [
            one
            for one in self.segments
            if one.path is not None
            and one.turn == item.turn
            and one.path.rpartition(".")[0] == parent
        ]


@dataclass(frozen=True)
class Layouts:
    """The chosen layout of every kind of segment."""

    chosen: Mapping[int, Chosen]

    @property
    def splits_anything(self) -> bool:
        """Whether the axes are used at all."""
        return any(any(dims) for one in self.chosen.values() for dims in one.dims.values())


class Stack:
    """All segments for microbatches of `num_samples`, over `axes` of representative ranks."""

    def __init__(
        self,
        outline: Outline,
        cluster: Cluster,
        axes: tuple[Axis, ...],
        num_samples: int,
        *,
        calibration: Calibration | None = None,
        may_split: MaySplit | None = None,
        first: int = 0,
        priced: dict[object, Part] | None = None,
    ) -> None:
        self.outline = outline
        self.cluster = cluster
        self.axes = axes
        self.num_samples = num_samples
        self.calibration = calibration
        self.priced = {} if priced is None else priced
        self.graph = outline.graph(num_samples)
        self.resharding = Resharding(axes, cluster)
        self.device = cluster.device(first)
        self.segments = {
            kind: self._segment(index, may_split) for kind, index in outline.representatives.items()
        }
        self._costs: dict[tuple[int, str, int], Cost] = {}
        self._folded: dict[tuple[int, ...], Cost] = {}
        self._parts: dict[tuple[int, str], Parts] = {}
        self._layouts: dict[object, Layouts] = {}
        self._sizes: dict[int, tuple[Layouts, dict[str, int]]] = {}

    def _segment(self, index: int, may_split: MaySplit | None) -> Segment:
        item = self.outline.segments[index]
        ops = self.graph.ops[item.begin : item.end]
        graph = cut_out(self.graph, ops, item.path or self.graph.name)
        loops: dict[str, str] = {}
        if self.outline.follows(index):
            before = self.outline.segments[index - 1]
            pairs = zip(self.graph.ops[before.begin : before.end], ops, strict=True)
            loops = {
                theirs: mine
                for one, other in pairs
                for theirs, mine in zip(one.outputs, other.outputs, strict=True)
            }
        return Segment(
            graph=graph,
            ops=ops,
            axes=self.axes,
            resharding=self.resharding,
            parts=self._priced(graph, self.device),
            learned=self.outline.learned,
            first_keeper=self.outline.first_keeper,
            num_samples=self.num_samples,
            loops=loops,
            may_split=may_split,
            whole_weights=item.path is None and item.kind in self.outline.original,
            num_forwards=1 if item.path is None else self.outline.num_passes,
        )

    def _priced(self, graph: OpGraph, device: Device) -> Parts:
        return Parts(graph, self.axes, device, self.outline.kernels, self.calibration, self.priced)

    # Layouts --------------------------------------------------------------------------------

    def fastest(self, weights: Weights, *, time_limit_s: float = 5.0) -> Layouts:
        """Return the fastest layouts, whatever they hold."""
        return self.tightened(weights, 1.0, time_limit_s=time_limit_s)

    def tightened(self, weights: Weights, room: float, *, time_limit_s: float = 5.0) -> Layouts:
        """Return the fastest layouts whose memory is at most `room` of the way from each
        segment's least (0) to what its fastest layout holds (1).
        """
        key = (weights, room)
        if key not in self._layouts:
            fastest = None if room >= 1 else self.fastest(weights, time_limit_s=time_limit_s)
            limits: dict[int, float] = {}
            for kind, segment in self.segments.items():
                # Passes before the last keep nothing, and are split as it is.
                if fastest is not None and kind not in self.outline.original:
                    least = segment.least_memory(weights)
                    most = fastest.chosen[kind].memory
                    limits[kind] = least + room * max(0.0, most - least)
            self._layouts[key] = self._solved(weights, limits, None, time_limit_s)
        return self._layouts[key]

    def given(self, dims: Mapping[str, Dims]) -> Layouts:
        """Return the layouts that split operators as told and replicate all others."""
        return self._solved(Weights(), {}, dims, 5.0)

    def _solved(
        self,
        weights: Weights,
        limits: Mapping[int, float],
        dims: Mapping[str, Dims] | None,
        time_limit_s: float,
    ) -> Layouts:
        made: dict[str, End] = {}
        taken: dict[str, list[End]] = {}
        chosen: dict[int, Chosen] = {}
        original = self.outline.original
        order = sorted(
            self.segments, key=lambda kind: (kind in original, not self.segments[kind].loops, kind)
        )
        for kind in order:
            segment = self.segments[kind]
            fixed = dims
            if kind in original and dims is None:
                fixed = self._as_last(kind, chosen[original[kind]])
            outputs = {name for op in segment.ops for name in op.outputs}
            inputs = {name for op in segment.ops for name in op.inputs} - outputs
            found = segment.solve(
                weights,
                {name: made[name] for name in inputs if name in made and not segment.loops},
                {name: taken[name] for name in outputs if name in taken},
                fixed=fixed,
                memory_limit=limits.get(kind, float("inf")) * (1 + 1e-9),
                time_limit_s=time_limit_s,
                gap=_GAP,
            )
            assert found is not None
            chosen[kind] = found
            self._spread(kind, found, made, taken)
        return Layouts(chosen)

    def _as_last(self, kind: int, last: Chosen) -> dict[str, Dims] | None:
        """How a block's operators are split in a pass before the last: as there, so that one part
        of the weights serves both. None outside the blocks, where weights stay whole.
        """
        own, theirs = self.segments[kind].ops, self.segments[self.outline.original[kind]].ops
        if [op.target for op in own] != [op.target for op in theirs]:
            return None
        pairs = zip(own, theirs, strict=True)
        return {mine.name: last.dims[op.name] for mine, op in pairs if op.name in last.dims}

    def _spread(
        self, kind: int, found: Chosen, made: dict[str, End], taken: dict[str, list[End]]
    ) -> None:
        """Note the ends of every copy of a kind."""
        outline = self.outline
        own = self.segments[kind].ops
        for index, item in enumerate(outline.segments):
            if item.kind != kind:
                continue
            names: dict[str, str] = {}
            for mine, theirs in zip(own, self.graph.ops[item.begin : item.end], strict=True):
                names.update(zip(mine.outputs, theirs.outputs, strict=True))
                names.update(zip(mine.inputs, theirs.inputs, strict=True))
            for name, end in found.makes.items():
                made[names[name]] = end
            for name, end in found.takes.items():
                # Copies in a row have settled between themselves.
                if name not in self.segments[kind].loops or not outline.follows(index):
                    taken.setdefault(names[name], []).append(end)

    # Costs ----------------------------------------------------------------------------------

    def costs(self, layouts: Layouts, device: Device | None = None) -> tuple[Cost, ...]:
        """Return what each item of the chain costs on a device."""
        where = device or self.device
        found = {}
        for kind, chosen in layouts.chosen.items():
            key = (kind, where.name, id(chosen))
            if key not in self._costs:
                segment = self.segments[kind]
                if where is self.device:
                    parts = segment.parts
                else:
                    parts = self._parts.setdefault(
                        (kind, where.name), self._priced(segment.graph, where)
                    )
                self._costs[key] = segment.cost(chosen, parts)
            found[kind] = self._costs[key]
        every = [found[item.kind] for item in self.outline.segments]
        if self.outline.num_passes == 1:
            return tuple(every)
        return tuple(
            self._with_earlier(found[item.kind], tuple(every[place] for place in earlier))
            for item, earlier in zip(self.outline.items, self.outline.earlier, strict=True)
        )

    def _with_earlier(self, last: Cost, earlier: tuple[Cost, ...]) -> Cost:
        """A pass with what those before it take: forward alone."""
        key = (id(last), *map(id, earlier))
        if key not in self._folded:
            seconds = sum(cost.forward_s for cost in earlier)
            self._folded[key] = replace(
                last,
                forward_s=last.forward_s + seconds,
                earlier_s=seconds,
                temporary_bytes=max(cost.temporary_bytes for cost in (last, *earlier)),
            )
        return self._folded[key]

    def sizes(self, layouts: Layouts) -> dict[str, int]:
        """Return the bytes one rank has of every tensor that depends on a parameter, as made."""
        if id(layouts) not in self._sizes:
            self._sizes[id(layouts)] = layouts, self._sized(layouts)
        return self._sizes[id(layouts)][1]

    def _sized(self, layouts: Layouts) -> dict[str, int]:
        found: dict[str, int] = {}
        for kind, chosen in layouts.chosen.items():
            own = self.segments[kind].ops
            parts = {name: share(end.tensor, self.axes) for name, end in chosen.makes.items()}
            for item in self.outline.segments:
                if item.kind != kind:
                    continue
                theirs = self.graph.ops[item.begin : item.end]
                for mine, other in zip(own, theirs, strict=True):
                    for name, copy in zip(mine.outputs, other.outputs, strict=True):
                        if name in parts:
                            found[copy] = self.graph.tensors[copy].num_bytes // parts[name]
        return found
