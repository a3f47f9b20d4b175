"""Part: what of an operator one sub-operator does, and the algorithms that divide it further.

A part is told by the interval it takes of each dim identifier of its operator's annotation (see
ir.dims); its masks follow from that. Dividing a part changes its own masks and nobody else's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from toolkit.errors import UsageError
from toolkit.ir.dims import Annotation, Axis
from toolkit.plan.tensors import WHOLE, Chunk, Interval, Mask

_SHOWN = 8  # sizes listed in a message


@dataclass(frozen=True)
class Split:
    """Divide along a dim into `num` equal parts.

    `dim` is an identifier of the annotation, or an int for that dim of the first output (-1 is the
    last). Along a dim that is summed over, the parts produce partial sums of their outputs. Along
    one that is made from around each element, they read a halo: what their neighbours make too.
    """

    dim: str | int
    num: int


@dataclass(frozen=True)
class Replicate:
    """Do the same `num` times, to be assigned to as many devices."""

    num: int


Algorithm = Split | Replicate


@dataclass(frozen=True)
class Part:
    """A part of operator `op`: an interval of each identifier that was split, others whole.

    `chunk` is the share of the value that splits of summed dims left it. `replica` tells copies
    apart: parts that differ in it only do the same work.
    """

    op: str
    region: Mapping[str, Interval] = field(default_factory=dict, hash=False)
    chunk: Chunk = WHOLE
    replica: tuple[int, ...] = ()

    @property
    def work(self) -> str:
        """The name of what is done, which replicas share.

        >>> Part("up:linear", {"n": (0, 4)}, replica=(1,)).work
        'up:linear[n 0:4]'
        """
        inside = ", ".join(f"{name} {low}:{high}" for name, (low, high) in self.region.items())
        return f"{self.op}[{inside}]" if inside else self.op

    @property
    def name(self) -> str:
        """The name of this part alone."""
        return f"{self.work}#{'.'.join(map(str, self.replica))}" if self.replica else self.work

    def interval(self, name: str, found: Annotation) -> Interval:
        return self.region.get(name, (0, found.sizes[name]))

    def reads(self, found: Annotation) -> tuple[tuple[int, Mask], ...]:
        """Return what the part reads, as (place in `op.inputs`, mask), in order.

        An input is read in one piece, or in several where it is read over the end (see Halo).
        """
        return tuple(
            (index, Mask(box, self.chunk if index in found.addends else WHOLE))
            for index, spec in enumerate(found.inputs)
            for box in itertools.product(*(self._intervals(axis, found) for axis in spec))
        )

    def outputs(self, found: Annotation) -> tuple[Mask, ...]:
        """Return what the part makes of each output."""
        boxes = (tuple(self._interval(axis, found) for axis in spec) for spec in found.outputs)
        return tuple(Mask(box, self.chunk) for box in boxes)

    def _intervals(self, axis: Axis, found: Annotation) -> tuple[Interval, ...]:
        halo = found.halos.get(axis[0]) if axis else None
        if halo is not None and halo.of in self.region:
            return halo.reads(*self.region[halo.of])
        return (self._interval(axis, found),)

    def _interval(self, axis: Axis, found: Annotation) -> Interval:
        if not axis:
            return (0, 1)
        # Of a fused dim only the outermost factor is ever split.
        low, high = self.interval(axis[0], found)
        inner = math.prod(found.sizes[name] for name in axis[1:])
        return low * inner, high * inner


def identifier(dim: str | int, op: str, found: Annotation) -> str:
    """Return the identifier meant by `dim`; an int is a dim of the first output.

    Raises UsageError saying what can be split when `op` cannot be along it.
    """
    if isinstance(dim, int):
        name = _of_output(dim, found)
        what = f"dim {dim} of its output" + (f" ({name})" if name else "")
    else:
        name, what = dim, repr(dim)
    if name is None or found.kinds.get(name, "^") == "^":
        raise UsageError(f"{op} cannot be split along {what}", remedy=_choices(found))
    held = any(name in axis for spec in found.outputs for axis in spec)
    if found.kinds[name] == "+" and held:
        raise UsageError(
            f"{op} sums over {name} for some of its outputs only", remedy="split along another dim"
        )
    return name


def _of_output(dim: int, found: Annotation) -> str | None:
    spec = found.outputs[0] if found.outputs else ()
    axis = spec[dim] if -len(spec) <= dim < len(spec) else ()
    return axis[0] if axis else None


def _choices(found: Annotation) -> str:
    if not found.known:
        return "there is no rule how to split it: replicate it, or leave it whole"
    dims = (*found.splittable, *found.with_halo)
    names = ", ".join(f"{name} ({found.sizes[name]})" for name in dims)
    return f"of '{found}' these can: {names}" if names else "replicate it, or leave it whole"


def divide(part: Part, found: Annotation, algorithm: Algorithm) -> tuple[Part, ...]:
    """Return the parts that `algorithm` makes of a part, in order.

    Raises UsageError when the dim cannot be split or `num` does not divide its size.
    """
    if algorithm.num < 1:
        raise UsageError(f"{part.name} cannot be divided into {algorithm.num} parts")
    if algorithm.num == 1:
        return (part,)
    if isinstance(algorithm, Replicate):
        return tuple(
            replace(part, replica=(*part.replica, index)) for index in range(algorithm.num)
        )
    return _split(part, found, identifier(algorithm.dim, part.op, found), algorithm.num)


def _split(part: Part, found: Annotation, name: str, num: int) -> tuple[Part, ...]:
    low, high = part.interval(name, found)
    size, rest = divmod(high - low, num)
    if rest:
        works = [n for n in range(2, high - low + 1) if (high - low) % n == 0]
        shown = ", ".join(map(str, works[:_SHOWN])) + (", ..." if len(works) > _SHOWN else "")
        raise UsageError(
            f"{num} parts do not divide {name}={high - low} of {part.name}",
            remedy=f"use {shown}",
        )
    made = []
    for index in range(num):
        start = low + index * size
        summed = found.kinds[name] == "+"
        chunk = part.chunk.at(Chunk.part(index, num)) if summed else part.chunk
        region = {**part.region, name: (start, start + size)}
        made.append(replace(part, region=region, chunk=chunk))
    return tuple(made)
