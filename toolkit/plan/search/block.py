"""One segment of the chain (a block, or what lies around the blocks) as an inner problem.

Nodes are the segment's operators, with the ways to split them, and tensors that several operators
read, with the layouts they may be held in; edges move tensors forward and gradients back. A block
that follows a copy of itself hands its outputs to its own inputs, so the problem closes in a ring.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from toolkit.ir.graph import Op, OpGraph, Tensor
from toolkit.plan.chain import Segment as Run
from toolkit.plan.predict.alive import Alive
from toolkit.plan.program import rules
from toolkit.plan.search.choice import Chosen, Cost, Dims, End, Option, Side, Weights
from toolkit.plan.search.layouts import (
    Axis,
    AxisName,
    Layout,
    R,
    Resharding,
    V,
    Way,
    local_shape,
    share,
    ways,
)
from toolkit.plan.search.links import Links
from toolkit.plan.search.local import Parts


@dataclass
class Segment:
    """Operators to be laid out together. `loops` maps a tensor that the previous copy of this
    block makes to the one that corresponds to it here.
    """

    graph: OpGraph  # of the segment alone
    ops: tuple[Op, ...]
    axes: tuple[Axis, ...]
    resharding: Resharding
    parts: Parts
    learned: frozenset[str]
    first_keeper: Mapping[str, str]  # saved memory -> the operator that keeps it first
    num_samples: int
    loops: Mapping[str, str] = field(default_factory=dict)
    may_split: Callable[[str, str, AxisName], bool] | None = None
    whole_weights: bool = False
    num_forwards: int = 1  # in as many passes it runs forward, in one back
    _ways: dict[str, tuple[Way, ...]] = field(default_factory=dict, repr=False)
    _options: dict[object, Option] = field(default_factory=dict, repr=False)
    _sides: dict[object, Side] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.active = tuple(op for op in self.ops if any(t in self.learned for t in op.outputs))
        self._last_saver = max((i for i, op in enumerate(self.ops) if self._saves(op)), default=-1)
        self._place = {op.name: i for i, op in enumerate(self.ops)}

    # Options --------------------------------------------------------------------------------

    def ways(self, op: Op) -> tuple[Way, ...]:
        """Return the ways to run `op`: all the annotation allows, save splitting samples (the
        data axis does that) and, over the context axis, parameters.
        """
        if op.name not in self._ways:
            found = rules.annotation(op, self.graph)
            weights = {
                name
                for place, tensor in enumerate(op.inputs)
                if self.graph.tensors[tensor].role == "parameter"
                for dim in found.inputs[place]
                for name in dim
            }
            inplace = any("@" in name for name in op.outputs)

            def allowed(name: str, axis: AxisName) -> bool:
                whole = self.whole_weights or axis == "context"
                if inplace or (whole and name in weights):
                    return False
                if found.sizes[name] == self.num_samples and self._leads(op, name):
                    return False
                return self.may_split is None or self.may_split(op.name, name, axis)

            self._ways[op.name] = ways(found, self.axes, allowed)
        return self._ways[op.name]

    def _leads(self, op: Op, name: str) -> bool:
        """Whether an identifier is the first dim of an output or of every input that has it."""
        found = rules.annotation(op, self.graph)
        return any(spec and spec[0][:1] == (name,) for spec in (*found.outputs, *found.inputs))

    def _saves(self, op: Op) -> bool:
        return any(self.first_keeper.get(name) for name, _ in self._whole_kept(op))

    def _whole_kept(self, op: Op) -> tuple[tuple[str, int], ...]:
        return self.parts.part(op, self.ways(op)[0]).kept if self._is_active(op) else ()

    def _is_active(self, op: Op) -> bool:
        return any(name in self.learned for name in op.outputs)

    def option(self, op: Op, way: Way) -> Option:
        """Return what running `op` this way takes."""
        key = (op.name, way.dims)
        if key not in self._options:
            part = self.parts.part(op, way)
            self._options[key] = Option(
                part.forward_s,
                part.backward_s,
                self.sync_s(op, way),
                sum(size for name, size in part.kept if self.first_keeper.get(name) == op.name),
                sum(tensor.num_bytes for tensor in self.held(op, way).values()),
            )
        return self._options[key]

    def read(self, op: Op, place: int, chosen: Sequence[Way]) -> Side:
        """Return the ends of the tensor that `op` reads at `place`, one for each way chosen."""
        return self._side(
            ("read", op.name, place), chosen, lambda way: End(way.reads[place], way.leaves[place])
        )

    def made(self, op: Op, place: int, chosen: Sequence[Way]) -> Side:
        """Return the ends of the tensor that `op` makes at `place`, one for each way chosen."""
        return self._side(
            ("made", op.name, place), chosen, lambda way: End(way.makes[place], way.needs[place])
        )

    def _side(self, what: object, chosen: Sequence[Way], end: Callable[[Way], End]) -> Side:
        key = (what, chosen[0].dims if len(chosen) == 1 else None)
        if key not in self._sides:
            self._sides[key] = Side([end(way) for way in chosen])
        return self._sides[key]

    def holdings(self, around: Collection[Sequence[Layout]]) -> Side:
        """Return the layouts a tensor may be held in between its maker and its readers, which have
        those of `around`: whole, with a whole or a partial gradient, or sliced along a dim that
        somebody slices; axis by axis.
        """
        seen = frozenset(layout for layouts in around for layout in layouts)
        if seen not in self._sides:
            found: list[tuple[Layout, Layout]] = [((), ())]
            for axis in range(len(self.axes)):
                dims = sorted({layout[axis] for layout in seen if layout[axis] >= 0})
                pairs = [(R, R), (R, V), *((dim, dim) for dim in dims)]
                found = [((*t, a), (*g, b)) for t, g in found for a, b in pairs]
            # Two axes slice one dim only where an operator does so too.
            self._sides[seen] = Side([End(t, g) for t, g in found if t in seen or _once(t)])
        return self._sides[seen]

    # The problem ----------------------------------------------------------------------------

    def solve(
        self,
        weights: Weights,
        made: Mapping[str, End],
        taken: Mapping[str, Sequence[End]],
        *,
        fixed: Mapping[str, Dims] | None = None,
        memory_limit: float = float("inf"),
        time_limit_s: float = 5.0,
        gap: float = 1e-3,
    ) -> Chosen | None:
        """Return the best layout of the segment, or None when no layout stays within the limit.

        `made` and `taken` are the ends of tensors that other, solved segments make and read.
        `fixed` operators are split as given.
        """
        built = Links(self, weights, made, taken, fixed)
        found = built.problem.solve(memory_limit, time_limit_s=time_limit_s, gap=gap)
        return None if found is None else built.chosen(found)

    def least_memory(self, weights: Weights) -> float:
        """Return the least memory of any layout, as `weights` count it."""
        return float(
            sum(
                min(weights.memory(self.option(op, way)) for way in self.ways(op))
                for op in self.active
            )
        )

    def cost(self, chosen: Chosen, parts: Parts | None = None) -> Cost:
        """Return what a layout costs on the device of `parts` (default: the one searched for)."""
        parts = parts or self.parts
        forward_s = backward_s = weight_s = again_s = 0.0
        partial: dict[tuple[Layout, Layout], float] = {}
        saved = 0
        held: dict[str, Tensor] = {}
        for op in self.ops:
            way = self.way(op, chosen.dims.get(op.name))
            part = parts.part(op, way)
            forward_s += part.forward_s
            again_s += part.forward_s
            backward_s += part.backward_s
            weight_s += part.weight_s
            saved += sum(size for name, size in part.kept if self.first_keeper.get(name) == op.name)
            for key, size in self._partial(op, way):
                partial[key] = partial.get(key, 0.0) + size
            held.update(self.held(op, way))
        temporary, owed = self._passing(chosen)
        moves = Links(self, Weights(), chosen.made, chosen.taken, chosen.dims).moves()
        return Cost(
            forward_s=forward_s + moves.forward_s,
            backward_s=backward_s + moves.backward_s,
            weight_s=weight_s,
            again_s=again_s + moves.again_s,
            sync_s=sum(self.resharding.seconds(size, *key) for key, size in partial.items()),
            saved_bytes=saved,
            entering_bytes=self._entering(chosen),
            temporary_bytes=temporary,
            owed_bytes=owed,
            parameters=held,
        )

    def way(self, op: Op, dims: Dims | None) -> Way:
        """Return the way of `op` that splits `dims`; replicated when not given."""
        options = self.ways(op)
        return next((way for way in options if dims and way.dims == dims), options[0])

    def sync_s(self, op: Op, way: Way) -> float:
        """Seconds a step of summing gradients of weights that are whole on an axis which splits
        the work.
        """
        return sum(self.resharding.seconds(size, *key) for key, size in self._partial(op, way))

    def _partial(self, op: Op, way: Way) -> Iterator[tuple[tuple[Layout, Layout], float]]:
        """Yield (layout of the gradient, layout it is wanted in) and bytes of such weights."""
        for name, left in zip(op.inputs, way.leaves, strict=True):
            tensor = self.graph.tensors[name]
            if tensor.role == "parameter" and tensor.requires_grad and V in left:
                target = tuple(R if slot == V else slot for slot in left)
                yield (left, target), float(tensor.num_bytes)

    def held(self, op: Op, way: Way) -> dict[str, Tensor]:
        """Return the parameters that `op` reads, as they are on this rank."""
        return {
            name: self._part(name, read)
            for name, read in zip(op.inputs, way.reads, strict=True)
            if self.graph.tensors[name].role == "parameter"
        }

    def _part(self, name: str, layout: Layout) -> Tensor:
        tensor = self.graph.tensors[name]
        return replace(tensor, shape=local_shape(tensor.shape, layout, self.axes))

    def _passing(self, chosen: Chosen) -> tuple[int, int]:
        """What the fullest operator takes beyond what is saved, and what the input's half of
        backward leaves to the weights' half, in bytes; a tensor is as large as where it is largest.
        """
        if chosen.passing is None:
            largest: dict[str, Tensor] = {}
            for op in self.ops:
                way = self.way(op, chosen.dims.get(op.name))
                ends = [*zip(op.inputs, way.reads), *zip(op.outputs, way.makes)]  # noqa: B905
                for name, layout in ends:
                    part = self._part(name, layout)
                    if name not in largest or part.numel > largest[name].numel:
                        largest[name] = part
            local = replace(self.graph, tensors={**self.graph.tensors, **largest})
            life = Alive(local, self.parts.kernels).life([Run(None, self.ops)], (), local.outputs)
            fullest = max(moment.total for moment in (*life.forward, *life.backward))
            chosen.passing = max(0, fullest - life.kept), life.owed
        return chosen.passing

    def _entering(self, chosen: Chosen) -> int:
        made = {name for op in self.ops for name in op.outputs}
        read = dict.fromkeys(name for op in self.ops for name in op.inputs if name not in made)
        total = 0
        for name in read:
            tensor = self.graph.tensors[name]
            if tensor.role == "activation":
                end = chosen.takes.get(name)
                total += tensor.num_bytes // (share(end.tensor, self.axes) if end else 1)
        return total

    def repeated(self, consumers: Sequence[Op]) -> bool:
        """Whether recomputing moves a tensor to these operators again: something from the first
        of them on is still needed.
        """
        return min(self._place[op.name] for op in consumers) <= self._last_saver


def _once(layout: Layout) -> bool:
    sliced = [slot for slot in layout if slot >= 0]
    return len(set(sliced)) == len(sliced)
