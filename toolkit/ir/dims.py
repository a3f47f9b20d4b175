"""How an operator may be split: einops-like annotations, one identifier a dim.

`b t k+, n k+, ~n -> b t n` reads: tensors holding an identifier are sliced along it when it is
split and the others are copied to every part; the outputs of the parts are concatenated. `k+` is
summed over: the parts' outputs are partial sums. `d^` cannot be split. `(h d)` is one dim made of
two, of which only the first can be split. `~n` is added to the result: where the result is a
partial sum, it must be shared out over the parts (or given to one), or it counts once a part.
`[y]` is a dim read around the output's `y`, which is split with a halo: see Halo.

The rules are in splits.py; tests run every operator whole and in parts along each identifier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from toolkit.errors import UsageError
from toolkit.ir.graph import Argument, Op, OpGraph, refs

Kind = Literal["", "+", "^", "[]"]
Axis = tuple[str, ...]  # the identifiers a dim is made of; none for a dim of size 1
Spec = tuple[Axis, ...]

SUM: Literal["sum"] = "sum"
VALUE: Literal["value"] = "value"


@dataclass(frozen=True)
class Partition:
    """What splitting along one identifier does to each input and each output.

    An input is sliced along a dim (its index), copied (None), or shared out by value ("value"). An
    output is concatenated along a dim, summed ("sum"), or the same in every part (None).
    """

    inputs: tuple[int | Literal["value"] | None, ...]
    outputs: tuple[int | Literal["sum"] | None, ...]


@dataclass(frozen=True)
class Halo:
    """What of an input's dim of `size` a part of the output's dim `of` reads: for element i the
    `extent` elements from i * stride - before on. What lies outside is `fill`, or with `cyclic` the
    other end. `argument` (its name, and which of its numbers) says so to the operator: a part gets
    the elements themselves, and 0 for it.
    """

    of: str
    size: int
    argument: tuple[str, int]
    stride: int = 1
    extent: int = 1
    before: int = 0
    cyclic: bool = False
    fill: float = 0.0

    def _span(self, start: int, end: int) -> tuple[int, int]:
        """From where to where elements start to end of the output read, wherever that lies."""
        low = start * self.stride - self.before
        return low, low + (end - start - 1) * self.stride + self.extent

    def reads(self, start: int, end: int) -> tuple[tuple[int, int], ...]:
        """Return the intervals that elements `start` to `end` of the output read, in order.

        >>> Halo("y", 8, ("padding", 0), extent=3, before=1).reads(0, 4)
        ((0, 5),)
        >>> Halo("y", 8, ("shifts", 0), before=-2, cyclic=True).reads(4, 8)
        ((6, 8), (0, 2))
        """
        low, high = self._span(start, end)
        if not self.cyclic:
            return ((max(low, 0), min(high, self.size)),)
        low, length = low % self.size, high - low
        over = low + length - self.size
        return ((low, self.size), (0, over)) if over > 0 else ((low, low + length),)

    def padding(self, start: int, end: int) -> tuple[int, int]:
        """Return how many elements outside are read before the first and after the last."""
        low, high = self._span(start, end)
        return (0, 0) if self.cyclic else (max(-low, 0), max(high - self.size, 0))


@dataclass(frozen=True)
class Annotation:
    """Which dims of an operator's inputs (in the order of `op.inputs`) and outputs belong together.

    `halos` say how an input's identifier is read around one of the output's. `known` is False for
    an operator without a rule: then nothing of it can be split.
    """

    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    kinds: Mapping[str, Kind]
    sizes: Mapping[str, int]
    addends: tuple[int, ...] = ()
    known: bool = True
    halos: Mapping[str, Halo] = field(default_factory=dict)

    @property
    def splittable(self) -> tuple[str, ...]:
        """Identifiers that can be split by slicing, in order of appearance."""
        return tuple(name for name, kind in self.kinds.items() if kind in ("", "+"))

    @property
    def with_halo(self) -> tuple[str, ...]:
        """Identifiers that can be split by whoever gives the parts what lies around them."""
        return tuple(name for name, kind in self.kinds.items() if kind == "[]")

    def leading(self, axis: Axis) -> str:
        """Return the identifier whose split divides a dim; "" for a dim of size 1."""
        name = axis[0] if axis else ""
        return self.halos[name].of if name in self.halos else name

    def partition(self, name: str) -> Partition:
        """Return what splitting along `name` does. Raises UsageError when slices do not do."""
        if self.kinds.get(name) not in ("", "+"):
            known = ", ".join(self.splittable) or "none"
            raise UsageError(f"{name!r} of '{self}' cannot be split; these can: {known}")
        reduced = self.kinds[name] == "+"

        def dim(spec: Spec) -> int | None:
            return next((index for index, axis in enumerate(spec) if name in axis), None)

        inputs: list[int | Literal["value"] | None] = []
        for index, spec in enumerate(self.inputs):
            shared = reduced and index in self.addends
            inputs.append(VALUE if shared else dim(spec))
        outputs: list[int | Literal["sum"] | None] = []
        for spec in self.outputs:
            outputs.append(SUM if reduced and dim(spec) is None else dim(spec))
        return Partition(tuple(inputs), tuple(outputs))

    def __str__(self) -> str:
        def axis_text(axis: Axis) -> str:
            named = [
                name if name in self.halos or kind == "[]" else name + kind
                for name, kind in ((name, self.kinds[name]) for name in axis)
            ]
            return "1" if not named else named[0] if len(named) == 1 else f"({' '.join(named)})"

        def spec_text(spec: Spec) -> str:
            return " ".join(axis_text(axis) for axis in spec) or "()"

        inputs = ", ".join(
            ("~" if index in self.addends else "") + spec_text(spec)
            for index, spec in enumerate(self.inputs)
        )
        return f"{inputs} -> {', '.join(spec_text(spec) for spec in self.outputs)}".strip()


@dataclass
class Builder:
    """Collects the specs of one operator; what rules in splits.py fill in."""

    op: Op
    graph: OpGraph
    inputs: dict[int, Spec] = field(default_factory=dict)
    outputs: dict[int, Spec] = field(default_factory=dict)
    kinds: dict[str, Kind] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    addends: list[int] = field(default_factory=list)
    halos: dict[str, Halo] = field(default_factory=dict)

    def new(self, size: int, kind: Kind = "", name: str = "") -> Axis:
        """Return a new axis of `size`; no identifier at all when the size is 1."""
        if size == 1:
            return ()
        made = name if name and name not in self.sizes else self._free(name)
        self.sizes[made] = size
        self.kinds[made] = kind
        return (made,)

    def _free(self, stem: str) -> str:
        letters = [stem] if stem else list("abcdefghijlmopqrstuvwxyz")
        rounds = 0
        while True:
            for letter in letters:
                made = f"{letter}{rounds or ''}"
                if made not in self.sizes:
                    return made
            rounds += 1

    def fixed(self, *axes: Axis) -> None:
        """Mark every identifier of `axes` as not splittable."""
        for axis in axes:
            for name in axis:
                self.kinds[name] = "^"

    def fresh(self, shape: Sequence[int], kind: Kind = "") -> Spec:
        return tuple(self.new(size, kind) for size in shape)

    def around(self, size: int, halo: Halo) -> tuple[Axis, Axis]:
        """Return the axis of an input's dim, and that of the output's dim of `size` made around it
        (`halo.of` is filled in).
        """
        made = self.new(size, "[]")
        if not made or halo.size == 1:
            self.fixed(made)
            return self.new(halo.size, "^"), made
        read = self.new(halo.size, "^", f"[{made[0]}]")
        self.halos[read[0]] = replace(halo, of=made[0])
        return read, made

    def size(self, axis: Axis) -> int:
        return math.prod(self.sizes[name] for name in axis)

    def index(self, argument: str) -> int:
        """The place in `op.inputs` of the tensor given as `argument`."""
        place = 0
        for name, value in self.op.arguments.items():
            if name == argument:
                return place
            place += sum(1 for _ in refs(value))
        raise KeyError(argument)

    def shape(self, argument: str) -> tuple[int, ...]:
        return self.graph.tensors[self.op.inputs[self.index(argument)]].shape

    @property
    def in_shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tensor.shape for tensor in self.graph.input_tensors(self.op))

    @property
    def out_shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tensor.shape for tensor in self.graph.output_tensors(self.op))

    def done(self) -> Annotation | None:
        """Return the annotation, or None when the specs do not fit the shapes after all."""
        shapes = [*self.in_shapes, *self.out_shapes]
        specs = [self.inputs.get(i) for i in range(len(self.in_shapes))]
        specs += [self.outputs.get(i) for i in range(len(self.out_shapes))]
        for spec, shape in zip(specs, shapes, strict=True):
            if spec is None or tuple(map(self.size, spec)) != tuple(shape):
                return None
        for spec in specs:
            for axis in spec or ():
                # Only the outermost factor of a fused dim is contiguous in it.
                self.fixed(axis[1:])
        number = len(self.in_shapes)
        found = [spec or () for spec in specs]
        return Annotation(
            tuple(found[:number]), tuple(found[number:]), dict(self.kinds), dict(self.sizes),
            tuple(self.addends), halos=dict(self.halos),
        )  # fmt: skip


def annotation(op: Op, graph: OpGraph) -> Annotation:
    """Return how `op` may be split; not at all (`known` False) when there is no rule for it."""
    from toolkit.ir import rearrange, splits, windows

    assert rearrange  # imported for the rules they register
    assert windows
    rule = splits.RULES.get(op.kind)
    if rule is not None:
        builder = Builder(op, graph)
        rule(builder)
        found = builder.done()
        if found is not None:
            return found
    return _whole(op, graph)


def unannotated(graph: OpGraph) -> tuple[Op, ...]:
    """Return the operators that can only run whole because no rule says how to split them."""
    return tuple(op for op in graph.ops if not annotation(op, graph).known)


def _whole(op: Op, graph: OpGraph) -> Annotation:
    builder = Builder(op, graph)
    inputs = tuple(builder.fresh(shape, "^") for shape in builder.in_shapes)
    outputs = tuple(builder.fresh(shape, "^") for shape in builder.out_shapes)
    return Annotation(inputs, outputs, builder.kinds, builder.sizes, known=False)


def local_arguments(op: Op, found: Annotation, name: str, num: int) -> dict[str, Argument]:
    """Return the arguments of one of `num` equal parts of `op`, split along `name`.

    Only sizes change: the shape a view or a creation is given. Raises UsageError when `num` does
    not divide the size.
    """
    from toolkit.ir import splits

    size = found.sizes[name]
    if size % num:
        raise UsageError(f"{num} parts do not divide {name}={size} of {op.name}")
    arguments = dict(op.arguments)
    sized = splits.SHAPE_ARGUMENTS.get(op.kind)
    dim = found.partition(name).outputs[0]
    if sized is not None and isinstance(dim, int):
        shape = list(arguments[sized])
        if shape[dim] != -1:
            shape[dim] //= num
        arguments[sized] = tuple(shape)
    return arguments
