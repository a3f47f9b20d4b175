"""How an operator may be split over the axes of a stage's mesh, and what it costs to go from one
layout of a tensor to another, forward and back.

A layout has one slot per axis: R (whole on every rank), V (partial sums) or the dim that is sliced.
A link between two operators carries the tensor one way and its gradient the other:

    operator's part holds identifier x | reads        leaves in backward
    at dim i of the input              | slice i      slice i
    not in the input                   | all of it    partial sums (V)
    at dim j of the output             | makes j      needs slice j
    nowhere in the output, x is summed | makes V      needs all of it
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from toolkit.cost import collective
from toolkit.hardware import Cluster
from toolkit.ir.dims import Annotation

R, V = -1, -2
Layout = tuple[int, ...]  # R, V or a dim, one per axis
AxisName = Literal["context", "tensor"]


@dataclass(frozen=True)
class Axis:
    """An axis that splits operators: its ranks in one representative group, and how many such
    groups share a machine's ports.
    """

    name: AxisName
    size: int
    ranks: tuple[int, ...]
    concurrent: int = 1


@dataclass(frozen=True)
class Way:
    """One way to run an operator: the identifier each axis splits (None: replicate), and what
    follows for its inputs (read, and left as gradients) and outputs (made, and needed back).
    """

    dims: tuple[str | None, ...]
    reads: tuple[Layout, ...]
    leaves: tuple[Layout, ...]
    makes: tuple[Layout, ...]
    needs: tuple[Layout, ...]

    @property
    def replicated(self) -> bool:
        return not any(self.dims)


def ways(
    found: Annotation,
    axes: Sequence[Axis],
    allowed: Callable[[str, AxisName], bool] = lambda name, axis: True,
) -> tuple[Way, ...]:
    """Return every way to split an operator over `axes`, replicating everywhere first.

    An identifier may be split by two axes, the outer first, if its size allows. `allowed` vetoes
    identifiers by axis.
    """
    names = [name for name in found.splittable if _whole_effect(found, name)]
    per_axis: list[list[str | None]] = [
        [None, *(n for n in names if found.sizes[n] % axis.size == 0 and allowed(n, axis.name))]
        for axis in axes
    ]
    return tuple(
        way(found, dims)
        for dims in itertools.product(*per_axis)
        if all(found.sizes[n] % parts == 0 for n, parts in _parts(dims, axes))
    )


def _whole_effect(found: Annotation, name: str) -> bool:
    """Whether a split along `name` slices every output, or makes partial sums of every output."""
    outputs = found.partition(name).outputs
    summed = found.kinds[name] == "+"
    return bool(outputs) and all((o == "sum") if summed else isinstance(o, int) for o in outputs)


def _parts(dims: Sequence[str | None], axes: Sequence[Axis]) -> Iterator[tuple[str, int]]:
    for name in {name for name in dims if name}:
        yield name, math.prod(a.size for d, a in zip(dims, axes, strict=True) if d == name)


def way(found: Annotation, dims: Sequence[str | None]) -> Way:
    """Return what splitting along `dims`, one per axis, does to every input and output."""
    reads: list[list[int]] = [[] for _ in found.inputs]
    leaves: list[list[int]] = [[] for _ in found.inputs]
    makes: list[list[int]] = [[] for _ in found.outputs]
    needs: list[list[int]] = [[] for _ in found.outputs]
    for name in dims:
        part = found.partition(name) if name else None
        for place in range(len(found.inputs)):
            how = part.inputs[place] if part else R
            # A value that is shared out is read whole, and its gradient arrives whole.
            read, left = (how, how) if isinstance(how, int) else (R, R if how == "value" else V)
            reads[place].append(read)
            leaves[place].append(left)
        for place in range(len(found.outputs)):
            made = part.outputs[place] if part else R
            makes[place].append(made if isinstance(made, int) else V)
            needs[place].append(made if isinstance(made, int) else R)
    return Way(
        tuple(dims),
        tuple(map(tuple, reads)),
        tuple(map(tuple, leaves)),
        tuple(map(tuple, makes)),
        tuple(map(tuple, needs)),
    )


def share(layout: Layout, axes: Sequence[Axis]) -> int:
    """Return into how many slices a layout divides a tensor.

    >>> axes = (Axis("context", 2, (0, 4)), Axis("tensor", 4, (0, 1, 2, 3)))
    >>> share((R, 1), axes), share((0, 1), axes), share((V, R), axes)
    (4, 8, 1)
    """
    return math.prod(axis.size for axis, slot in zip(axes, layout, strict=True) if slot >= 0)


def local_shape(shape: Sequence[int], layout: Layout, axes: Sequence[Axis]) -> tuple[int, ...]:
    """Return the shape one rank holds."""
    found = list(shape)
    for axis, slot in zip(axes, layout, strict=True):
        if slot >= 0:
            found[slot] //= axis.size
    return tuple(found)


# In this order a tensor is small while it travels: what shrinks it first, what gathers it last.
def _rank(source: int, target: int) -> int:
    if target >= 0:
        return 0 if source < 0 else 1
    return 2 if source == V else 3


@dataclass(frozen=True)
class Resharding:
    """Seconds of going from one layout to another, by the cluster's own collectives."""

    axes: tuple[Axis, ...]
    cluster: Cluster
    _seen: dict[object, float] = field(default_factory=dict, repr=False, compare=False)
    _tables: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)

    def table(
        self, num_bytes: float, sources: tuple[Layout, ...], targets: tuple[Layout, ...]
    ) -> Any:
        """Return `seconds` of every source (a row) to every target (a column)."""
        key = (num_bytes, sources, targets)
        if key not in self._tables:
            self._tables[key] = np.array(
                [[self.seconds(num_bytes, one, other) for other in targets] for one in sources]
            )
        return self._tables[key]

    def seconds(self, num_bytes: float, source: Layout, target: Layout) -> float:
        """Return what moving a tensor of `num_bytes` (whole) from `source` to `target` takes.

        Axis after axis. Any layout is partial sums already, so V as a target costs nothing.
        """
        if source == target or not num_bytes:
            return 0.0
        key = (num_bytes, source, target)
        if key not in self._seen:
            self._seen[key] = self._path(num_bytes, source, target)
        return self._seen[key]

    def _path(self, num_bytes: float, source: Layout, target: Layout) -> float:
        held = num_bytes / share(source, self.axes)
        order = sorted(range(len(self.axes)), key=lambda i: _rank(source[i], target[i]))
        total = 0.0
        for i in order:
            kind, held_after, moved = _move(source[i], target[i], held, self.axes[i].size)
            if kind:
                total += self.collective(kind, moved, self.axes[i])
            held = held_after
        return total

    def collective(self, kind: str, num_bytes: float, axis: Axis) -> float:
        """Return the seconds of a collective along an axis, while its sibling groups run too."""
        key = (kind, num_bytes, axis.name)
        if key not in self._seen:
            self._seen[key] = collective.cost(
                kind, num_bytes, axis.ranks, self.cluster, concurrent=axis.concurrent
            ).seconds
        return self._seen[key]


def _move(source: int, target: int, held: float, size: int) -> tuple[str, float, float]:
    """(collective or "", bytes held afterwards, bytes of the full tensor that it counts)."""
    if target in (source, V):
        return "", held * size if source >= 0 and target == V else held, 0.0
    if target >= 0:
        if source == R:
            return "", held / size, 0.0
        if source == V:
            return "reduce_scatter", held / size, held
        return "all_to_all", held, held * size
    return ("all_reduce", held, held) if source == V else ("all_gather", held * size, held * size)
