"""Transfers: which holders a wanted part of a tensor is put together from.

A part is covered by boxes of those who hold it: its own rank first, then the nearest, then the
least busy. Partial sums are never cut: one that lies across several wanted chunks goes whole to the
one in which it begins, and counts as zero in the others, so that what is wanted adds up.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from toolkit.plan.tensors import Mask, overlap


@dataclass(frozen=True)
class Holding:
    """A part of a tensor that `rank` has; `name` is for whoever asks."""

    rank: int
    mask: Mask
    name: str = ""


@dataclass(frozen=True)
class Transfer:
    """`mask` of what a holding has goes to rank `to` (which may be its own)."""

    holding: Holding
    to: int
    mask: Mask


Distance = Callable[[int, int], float]


@dataclass
class Market:
    """Holdings to cover wants from. Their chunks must not overlap unless equal (one family).

    `distance(holder, to)` ranks the holders of other ranks.
    """

    holdings: Sequence[Holding]
    distance: Distance
    _served: dict[int, int] = field(default_factory=dict)
    _dim: int = 0
    _sorted: list[Holding] = field(default_factory=list)
    _starts: list[int] = field(default_factory=list)
    _longest: int = 0
    _local: dict[int, list[Holding]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for holding in self.holdings:
            self._local.setdefault(holding.rank, []).append(holding)
        boxes = [holding.mask.box for holding in self.holdings]
        if not boxes or not boxes[0]:
            self._sorted = list(self.holdings)
            return
        dims = range(len(boxes[0]))
        self._dim = max(dims, key=lambda dim: len({box[dim] for box in boxes}))
        self._sorted = sorted(self.holdings, key=self._start)
        self._starts = [self._start(holding) for holding in self._sorted]
        self._longest = max(box[self._dim][1] - box[self._dim][0] for box in boxes)

    def _start(self, holding: Holding) -> int:
        return holding.mask.box[self._dim][0]

    def _near(self, wanted: Mask) -> Iterable[Holding]:
        """Holdings that may overlap what is wanted."""
        if not self._starts:
            return self._sorted
        start, end = wanted.box[self._dim]
        low = bisect.bisect_right(self._starts, start - self._longest)
        return self._sorted[low : bisect.bisect_left(self._starts, end)]

    def add(self, holding: Holding) -> None:
        """Let a rank use for itself what has been sent to it."""
        self._local.setdefault(holding.rank, []).append(holding)

    def cover(self, wanted: Mask, to: int) -> tuple[list[Transfer], list[Mask]]:
        """Return what makes up `wanted` on rank `to`, and what of it nobody holds.

        The transfers' boxes are disjoint where their chunks are equal, and they add up.
        """
        found: list[Transfer] = []
        rest = self._take(self._local.get(to, ()), wanted, to, [wanted], found)
        if rest:
            others = [held for held in self._near(wanted) if held.rank != to]
            others = [held for held in others if overlap(held.mask.box, wanted.box) is not None]
            others.sort(key=lambda held: self._order(held, wanted, to))
            rest = self._take(others, wanted, to, rest, found)
        return found, rest

    def _order(self, held: Holding, wanted: Mask, to: int) -> tuple[float, int, int, int]:
        box = overlap(held.mask.box, wanted.box)
        assert box is not None
        return (
            self.distance(held.rank, to),
            -Mask(box).numel,
            self._served.get(held.rank, 0),
            abs(held.rank - to),
        )

    def _take(
        self,
        holdings: Iterable[Holding],
        wanted: Mask,
        to: int,
        rest: list[Mask],
        found: list[Transfer],
    ) -> list[Mask]:
        """Cover `rest` from `holdings` in order; return what is left."""
        for held in holdings:
            if not rest:
                break
            left: list[Mask] = []
            for part in rest:
                both = part & held.mask
                if both is None:
                    left.append(part)
                    continue
                left += part.minus(both)
                if held.mask.chunk.low >= wanted.chunk.low:
                    found.append(Transfer(held, to, Mask(both.box, held.mask.chunk)))
                    if held.rank != to:
                        self._served[held.rank] = self._served.get(held.rank, 0) + both.numel
            rest = left
        return rest
