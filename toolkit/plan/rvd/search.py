"""The cheapest path between two layouts of one group: Dijkstra over placed layouts.

Unlike the published search, which finds a path of counts first and devices for it afterwards, the
states here are placed, so a path is priced on the links it really uses and always ends where asked.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Hashable
from dataclasses import dataclass, replace

from toolkit.errors import UsageError
from toolkit.plan.rvd.layouts import Placed, Slots, V, groups
from toolkit.plan.rvd.moves import (
    LOCAL,
    Move,
    Neighbour,
    Space,
    full_bytes,
    joined,
    kind,
    local_numel,
    pairs,
    space,
)
from toolkit.plan.rvd.prices import Prices, Ranks

# Layouts of more axes than this are too many to visit.
MOST_AXES = 6
# Of paths that differ only by rounding (in seconds, or elements), the one with fewer moves wins.
_HOP = 1e-13
# One all-reduce that does it all stays one, unless its parts one by one take this much less: how
# to mix algorithms inside a collective is its library's business.
_CLEARLY = 1.25


@dataclass(frozen=True)
class Path:
    """Moves in order, the cost of each, and the group they run on (positions -> ranks)."""

    ranks: Ranks
    axes: tuple[int, ...]
    moves: tuple[Move, ...]
    costs: tuple[float, ...]

    @property
    def cost(self) -> float:
        return sum(self.costs)

    def groups(self, move: Move) -> tuple[Ranks, ...]:
        """Return the ranks of each of a move's groups, in the order of the pieces they hold."""
        return tuple(
            tuple(self.ranks[position] for position in members)
            for members in groups(self.axes, move.axes)
        )

    def __str__(self) -> str:
        if not self.moves:
            return "nothing to do"
        states = [self.moves[0].before, *(move.after for move in self.moves)]
        texts = [str(Placed(self.axes, slots).layout) for slots in states]
        hops = (f" -{move.kind}-> {text}" for move, text in zip(self.moves, texts[1:], strict=True))
        return texts[0] + "".join(hops)


class Pricer:
    """Prices moves on the ranks of a group; equal moves are priced once."""

    def __init__(
        self,
        prices: Prices,
        ranks: Ranks,
        axes: tuple[int, ...],
        shape: tuple[int, ...],
        item_bytes: int,
    ) -> None:
        self.prices = prices
        self.ranks = ranks
        self.axes = axes
        self.shape = shape
        self.item_bytes = item_bytes
        self._costs: dict[Hashable, float] = {}
        self._bytes: dict[Slots, int] = {}

    def local_bytes(self, state: Slots) -> int:
        """Bytes one rank holds in a layout."""
        if state not in self._bytes:
            numel = local_numel(self.shape, self.axes, state)
            self._bytes[state] = numel * self.item_bytes
        return self._bytes[state]

    def __call__(self, kind_: str, together: tuple[int, ...], before: Slots) -> float:
        """Cost of a collective or local move over the groups along `together`, ascending."""
        local = self.local_bytes(before)
        key = (kind_, together, local)
        found = self._costs.get(key)
        if found is None:
            members = groups(self.axes, together)
            ranks = [tuple(self.ranks[position] for position in group) for group in members]
            num_bytes = full_bytes(kind_, len(members[0]), local)
            found = self._costs[key] = self.prices.collective(kind_, num_bytes, ranks)
        return found

    def permute(self, sends: tuple[tuple[int, int], ...], before: Slots) -> float:
        """Cost of sending what `before` holds between the pairs of positions."""
        local = self.local_bytes(before)
        found = self._costs.get((sends, local))
        if found is None:
            messages = [(self.ranks[a], self.ranks[b], local) for a, b in sends]
            found = self._costs[sends, local] = self.prices.messages(messages)
        return found

    def of(self, move: Move) -> float:
        """Cost of a move."""
        if move.kind == "permute":
            return self.permute(move.pairs, move.before)
        return self(move.kind, tuple(sorted(move.axes)), move.before)


class Frontier:
    """Dijkstra's search from a layout or, `backward`, towards it: the nearest layouts first.

    `cost` holds the best known cost of every layout met so far.
    """

    def __init__(
        self, start: Slots, space_: Space, price: Pricer, *, backward: bool = False
    ) -> None:
        self.space = space_
        self.price = price
        self.backward = backward
        self._one_by_one = price.prices.local_is_free
        self.cost: dict[Slots, float] = {start: 0.0}
        self._came: dict[Slots, tuple[Slots, Neighbour]] = {}
        self._settled: set[Slots] = set()
        self._number = itertools.count()
        self._queue: list[tuple[float, int, Slots]] = [(0.0, next(self._number), start)]

    @property
    def nearest(self) -> float:
        """Cost of the layout that would be settled next; infinite when there is none."""
        while self._queue and self._queue[0][2] in self._settled:
            heapq.heappop(self._queue)
        return self._queue[0][0] if self._queue else math.inf

    def settle(self) -> Slots:
        """Settle the nearest layout and meet its neighbours."""
        while True:
            cost, _, state = heapq.heappop(self._queue)
            if state not in self._settled:
                break
        self._settled.add(state)
        for step in self.space.neighbours(state):
            other = step.other
            if other in self._settled:
                continue
            if self.backward:
                what, before, after = kind(step.target, step.source), other, state
            else:
                what, before, after = kind(step.source, step.target), state, other
            if step.source < 0:
                sends = pairs(self.price.axes, step.source, step.together, before, after)
                total = cost + self.price.permute(sends, before) + _HOP
            elif self._one_by_one and what in LOCAL and len(step.order) > 1:
                continue  # free, so one axis at a time will do: `joined` puts them together
            else:
                total = cost + self.price(what, step.together, before) + _HOP
            if total < self.cost.get(other, math.inf):
                self.cost[other] = total
                self._came[other] = (state, step)
                heapq.heappush(self._queue, (total, next(self._number), other))
        return state

    def trace(self, state: Slots) -> tuple[Move, ...]:
        """Return the moves between the start and `state`, in the order they run."""
        found: list[Move] = []
        while state in self._came:
            state, step = self._came[state]
            found.append(self.space.move(state, step, backward=self.backward))
        return tuple(found if self.backward else found[::-1])


def room(shape: tuple[int, ...], layout: Placed, other: Placed) -> Space:
    """Return what a search between two layouts visits, on the first one's grid.

    Partial sums are made only where one of the layouts has some. Tensors whose shapes divide alike
    share a space.
    """
    limits = tuple(math.gcd(size, layout.num_ranks) for size in shape)
    return space(layout.axes, limits, bool(layout.slots[V] or other.slots[V]))


def check(shape: tuple[int, ...], ranks: Ranks, layout: Placed) -> None:
    """Raise UsageError when a layout does not fit the tensor or the group, or has too many axes."""
    layout.check(shape)
    if layout.num_ranks != len(ranks) or len(set(ranks)) != len(ranks):
        raise UsageError(f"{layout.layout} needs {layout.num_ranks} ranks, not {list(ranks)[:8]}")
    if len(layout.axes) > MOST_AXES:
        raise UsageError(
            f"a grid of axes {layout.axes} has too many layouts to search",
            remedy=f"describe the group by at most {MOST_AXES} axes",
        )


# Paths found before, by everything that decides them but the ranks' numbers.
_paths: dict[Hashable, Path] = {}
MOST_KEPT = 100_000


def find(
    shape: tuple[int, ...],
    item_bytes: int,
    ranks: Ranks,
    source: Placed,
    target: Placed,
    prices: Prices,
    *,
    at_once: bool = False,
) -> Path:
    """Return the cheapest path from `source` to `target`, both on the same grid of `ranks`.

    With `at_once`, an all-reduce that does it all is taken whatever its parts would cost: for
    callers that put many in one buffer. Raises UsageError for layouts that do not fit the tensor,
    the group or each other. Paths are remembered by the group's topology, not by its ranks.
    """
    for layout in (source, target):
        check(shape, ranks, layout)
    if source.axes != target.axes:
        raise UsageError(f"layouts on grids {source.axes} and {target.axes} share no axes")
    key = (shape, item_bytes, source, target, prices, at_once, prices.topology(ranks))
    if key not in _paths:
        if len(_paths) >= MOST_KEPT:
            _paths.clear()
        clearly = math.inf if at_once else _CLEARLY
        _paths[key] = _find(shape, item_bytes, ranks, source, target, prices, clearly)
    return replace(_paths[key], ranks=ranks)


def _find(
    shape: tuple[int, ...],
    item_bytes: int,
    ranks: Ranks,
    source: Placed,
    target: Placed,
    prices: Prices,
    clearly: float,
) -> Path:
    space_ = room(shape, source, target)
    price = Pricer(prices, ranks, source.axes, shape, item_bytes)
    ahead = Frontier(source.slots, space_, price)
    behind = Frontier(target.slots, space_, price, backward=True)
    best, middle = math.inf, source.slots
    # From both ends: no path is better once the nearest layouts of both add up to the best one.
    while ahead.nearest + behind.nearest < best:
        side, other = (ahead, behind) if ahead.nearest <= behind.nearest else (behind, ahead)
        state = side.settle()
        total = side.cost[state] + other.cost.get(state, math.inf)
        if total < best:
            best, middle = total, state
    moves = joined((*ahead.trace(middle), *behind.trace(middle)))
    for step in space_.neighbours(source.slots):
        if step.other == target.slots and step.source == V and not target.slots[V]:
            move = space_.move(source.slots, step)
            total = sum(price.of(move) for move in moves)
            if move.kind == "all_reduce" and price.of(move) <= clearly * total:
                moves = (move,)
    return Path(ranks, source.axes, moves, tuple(price.of(move) for move in moves))
