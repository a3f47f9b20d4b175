"""Layouts R(i)V(j)D(k1..kn) of a tensor over a group of devices, and which rank holds what.

R counts replicas, V partial sums, D slices along each dim; their product is the number of devices
(SuperScaler, arXiv 2301.08984, section 5). A `Layout` only counts. A `Placed` layout says where:
the group is a grid of axes, and each axis belongs to R, to V or to a dim.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from toolkit.errors import UsageError
from toolkit.plan.tensors import Chunk, Mask

# Places in `Placed.slots`: the axes of R, of V, then those of dim 0, dim 1, ...
R, V, D = 0, 1, 2
Slots = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, order=True)
class Layout:
    """How many replicas, partial sums, and slices along each dim.

    >>> print(Layout(2, 1, (4, 1)), Layout(2, 1, (4, 1)).num_ranks)
    R(2)V(1)D(4,1) 8
    """

    replicas: int
    values: int
    dims: tuple[int, ...]

    @property
    def num_ranks(self) -> int:
        return self.replicas * self.values * math.prod(self.dims)

    def __str__(self) -> str:
        return f"R({self.replicas})V({self.values})D({','.join(map(str, self.dims))})"


def every(shape: Sequence[int], num_ranks: int) -> tuple[Layout, ...]:
    """Return every layout of a tensor over `num_ranks` devices whose slices are of equal size.

    >>> [str(layout) for layout in every((4, 3), 2)]
    ['R(1)V(1)D(2,1)', 'R(1)V(2)D(1,1)', 'R(2)V(1)D(1,1)']
    """

    def factors(rest: int, sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
        if not sizes:
            if rest == 1:
                yield ()
            return
        for count in range(1, rest + 1):
            if rest % count == 0 and sizes[0] % count == 0:
                for tail in factors(rest // count, sizes[1:]):
                    yield (count, *tail)

    # Any count of replicas and partial sums will do: each divides 0.
    return tuple(Layout(row[0], row[1], row[2:]) for row in factors(num_ranks, (0, 0, *shape)))


@dataclass(frozen=True)
class Placed:
    """A layout on a group seen as a grid of `axes` (sizes, the last varies fastest along the
    group's ranks). `slots` lists the axes of R, of V, and of each dim, outermost axis first.

    Replicas and partial sums are interchangeable, so the axes of R and V are kept sorted.
    """

    axes: tuple[int, ...]
    slots: Slots

    def __post_init__(self) -> None:
        given = sorted(itertools.chain.from_iterable(self.slots))
        if given != list(range(len(self.axes))) or len(self.slots) < D:
            raise UsageError(f"axes {given} are not each of {len(self.axes)} axes once")
        slots = tuple(
            tuple(sorted(slot)) if place < D else slot for place, slot in enumerate(self.slots)
        )
        object.__setattr__(self, "slots", slots)

    @property
    def num_ranks(self) -> int:
        return math.prod(self.axes)

    @property
    def layout(self) -> Layout:
        counts = [math.prod(self.axes[axis] for axis in slot) for slot in self.slots]
        return Layout(counts[R], counts[V], tuple(counts[D:]))

    def check(self, shape: Sequence[int]) -> None:
        """Raise UsageError unless the slices of a tensor of `shape` are of equal size."""
        if len(self.slots) - D != len(shape):
            raise UsageError(f"{self} is no layout of a tensor of shape {tuple(shape)}")
        for dim, (size, count) in enumerate(zip(shape, self.layout.dims, strict=True)):
            if size % count:
                raise UsageError(
                    f"{self.layout} splits dim {dim} of shape {tuple(shape)} in {count} uneven "
                    f"slices",
                    remedy="collectives need equal ones: take a divisor of its size",
                )

    def index(self, slot: int, position: int) -> int:
        """Return which replica, partial sum or slice the group's rank at `position` holds."""
        strides = _strides(self.axes)
        found = 0
        for axis in self.slots[slot]:
            found = found * self.axes[axis] + position // strides[axis] % self.axes[axis]
        return found

    def mask(self, shape: Sequence[int], position: int) -> Mask:
        """Return what the group's rank at `position` holds of a tensor of `shape`."""
        layout = self.layout
        box = []
        for dim, (size, count) in enumerate(zip(shape, layout.dims, strict=True)):
            length = size // count
            start = self.index(D + dim, position) * length
            box.append((start, start + length))
        return Mask(tuple(box), Chunk.part(self.index(V, position), layout.values))

    def masks(self, shape: Sequence[int]) -> tuple[Mask, ...]:
        """Return what each rank of the group holds, in the group's order."""
        return tuple(self.mask(shape, position) for position in range(self.num_ranks))

    def __str__(self) -> str:
        def named(slot: tuple[int, ...]) -> str:
            return "x".join(f"{self.axes[axis]}@{axis}" for axis in slot) or "1"

        dims = ",".join(named(slot) for slot in self.slots[D:])
        return f"R({named(self.slots[R])})V({named(self.slots[V])})D({dims})"


@functools.lru_cache(maxsize=1024)
def _strides(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(axes[axis + 1 :]) for axis in range(len(axes)))


@functools.lru_cache(maxsize=4096)
def groups(axes: tuple[int, ...], together: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the positions that differ only along the axes `together`, group by group.

    Within a group the first of `together` varies slowest.

    >>> groups((2, 2), (0,)), groups((2, 2), (1, 0))
    (((0, 2), (1, 3)), ((0, 2, 1, 3),))
    """
    strides = _strides(axes)

    def corners(chosen: Sequence[int]) -> list[int]:
        steps = [[i * strides[axis] for i in range(axes[axis])] for axis in chosen]
        return [sum(parts) for parts in itertools.product(*steps)]

    apart = [axis for axis in range(len(axes)) if axis not in together]
    inside = corners(together)
    return tuple(tuple(base + offset for offset in inside) for base in corners(apart))


def recognise(shape: Sequence[int], masks: Sequence[Mask], axes: tuple[int, ...]) -> Placed | None:
    """Return the layout in which the rank at position p holds `masks[p]`, if the grid `axes` has
    one. Partial sums may be numbered in any way.
    """
    if math.prod(axes) != len(masks) or len({mask.shape for mask in masks}) != 1:
        return None
    first = masks[0]
    slots: list[list[tuple[int, int]]] = [[] for _ in range(D + len(shape))]
    for axis, stride in enumerate(_strides(axes)):
        other = masks[stride]
        moved = [
            d for d, pair in enumerate(zip(first.box, other.box, strict=True)) if len({*pair}) > 1
        ]
        if len(moved) + (first.chunk != other.chunk) > 1:
            return None
        if moved:
            step = other.box[moved[0]][0] - first.box[moved[0]][0]
            slots[D + moved[0]].append((-step, axis))
        else:
            slots[V if first.chunk != other.chunk else R].append((axis, axis))
    found = Placed(axes, tuple(tuple(axis for _, axis in sorted(slot)) for slot in slots))
    values = found.layout.values
    if any(size % count for size, count in zip(shape, found.layout.dims, strict=True)):
        return None
    chunks: dict[int, Chunk] = {}
    for position, mask in enumerate(masks):
        chunk = chunks.setdefault(found.index(V, position), mask.chunk)
        if found.mask(shape, position).box != mask.box or chunk != mask.chunk:
            return None
    complete = {Chunk.part(index, values) for index in range(values)} == {*chunks.values()}
    return found if complete else None


def grids(num_ranks: int) -> Iterator[tuple[int, ...]]:
    """Yield every grid of prime axes that has `num_ranks` places.

    >>> list(grids(12))
    [(2, 2, 3), (2, 3, 2), (3, 2, 2)]
    """

    def orders(primes: Sequence[int]) -> Iterator[tuple[int, ...]]:
        if not primes:
            yield ()
        for prime in sorted(set(primes)):
            rest = list(primes)
            rest.remove(prime)
            for tail in orders(rest):
                yield (prime, *tail)

    primes, rest, divisor = [], num_ranks, 2
    while rest > 1:
        while rest % divisor == 0:
            primes.append(divisor)
            rest //= divisor
        divisor += 1
    return orders(primes)


def align(
    shape: Sequence[int], first: Mapping[int, Mask], second: Mapping[int, Mask]
) -> tuple[tuple[int, ...], Placed, Placed] | None:
    """Return (ranks in order, layout of `first`, layout of `second`) on one grid, or None.

    Both map the same ranks to what they hold. Of all grids and orders tried, the first is taken
    on which both are regular.
    """

    def by_content(held: Mapping[int, Mask]) -> tuple[int, ...]:
        return tuple(sorted(held, key=lambda rank: (held[rank].box, held[rank].chunk, rank)))

    orders = dict.fromkeys((tuple(sorted(first)), by_content(first), by_content(second)))
    for ranks, axes in itertools.product(orders, list(grids(len(first)))):
        one = recognise(shape, [first[rank] for rank in ranks], axes)
        two = recognise(shape, [second[rank] for rank in ranks], axes) if one else None
        if one and two:
            one, two = coarsen(one, two)
            return ranks, one, two
    return None


# With at most this many axes a search visits every layout of them; more are merged if they can be.
FEW_AXES = 4


def coarsen(*layouts: Placed) -> tuple[Placed, ...]:
    """Merge neighbouring axes that no layout tells apart, until there are few."""
    while len(layouts[0].axes) > FEW_AXES:
        axes = layouts[0].axes
        merged = next(
            (a for a in range(len(axes) - 1) if all(_adjoin(x, a) for x in layouts)), None
        )
        if merged is None:
            break
        layouts = tuple(_merge(layout, merged) for layout in layouts)
    return layouts


def _adjoin(layout: Placed, axis: int) -> bool:
    """Whether `axis` and the next one follow each other in one slot."""
    return any((axis, axis + 1) in itertools.pairwise(slot) for slot in layout.slots)


def _merge(layout: Placed, axis: int) -> Placed:
    axes = layout.axes
    slots = tuple(
        tuple(place - (place > axis) for place in slot if place != axis + 1)
        for slot in layout.slots
    )
    return Placed((*axes[:axis], axes[axis] * axes[axis + 1], *axes[axis + 2 :]), slots)
