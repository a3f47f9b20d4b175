"""Layouts R(i)V(j)D(k1..kn) of a tensor over a group of devices, and which rank holds what.

R counts replicas, V partial sums, D slices of each dim; their product is the number of devices
(SuperScaler, arXiv 2301.08984, section 5). A `Layout` only counts; a `Placed` layout also says
where: the group is a grid of axes, and each axis is given to R, to V or to a dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


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
    """Return every layout of a tensor over `num_ranks` devices with slices of equal size.

    >>> [str(layout) for layout in every((4, 3), 2)]
    ['R(1)V(1)D(2,1)', 'R(1)V(2)D(1,1)', 'R(2)V(1)D(1,1)']
    """

    def factors(rest: int, sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
        if not sizes:
            yield (rest,)
            return
        for count in range(1, rest + 1):
            if rest % count == 0 and sizes[0] % count == 0:
                for tail in factors(rest // count, sizes[1:]):
                    yield (count, *tail)

    found = (factors(num_ranks, (num_ranks, num_ranks, *shape)),)
    return tuple(sorted(Layout(r, v, dims) for r, v, *dims, left in _tupled(found[0]) if left == 1))


def _tupled(rows: Iterator[tuple[int, ...]]) -> Iterator[tuple]:
    for row in rows:
        yield (row[0], row[1], *row[2:])
