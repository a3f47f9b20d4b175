"""From one group of devices to another: the search of both groups, joined by a crossing.

A crossing keeps the counts of a layout or changes one of them: more replicas (broadcast), fewer
(move), more or fewer slices (scatter, gather), more or fewer partial sums (value_scatter,
value_gather). What each receiver needs is found by content, so the groups may share ranks, and may
be the same ranks in orders that no grid aligns.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

from toolkit.plan.rvd.layouts import Layout, Placed, Slots, V
from toolkit.plan.rvd.moves import joined
from toolkit.plan.rvd.prices import Prices, Ranks
from toolkit.plan.rvd.search import (
    MOST_KEPT,
    Frontier,
    Path,
    Pricer,
    check,
    room,
)
from toolkit.plan.rvd.transfers import Holding, Market, Transfer
from toolkit.plan.tensors import Mask

# Placements of one layout, of all that are equally near, that a crossing is tried from and to.
_TRIED = 2


@dataclass(frozen=True)
class Crossing:
    """What goes from group to group. A broadcast runs in all `groups`, each led by its sender.

    `wanted` is what each rank of the consumers' group holds afterwards.
    """

    kind: str
    before: Placed
    after: Placed
    wanted: tuple[tuple[int, Mask], ...]
    transfers: tuple[Transfer, ...]
    groups: tuple[Ranks, ...]
    cost: float


@dataclass(frozen=True)
class Route:
    """A path in the producers' group, a crossing, and a path in the consumers' group."""

    first: Path
    crossing: Crossing
    last: Path

    @property
    def cost(self) -> float:
        return self.first.cost + self.crossing.cost + self.last.cost

    def __str__(self) -> str:
        before, after = self.crossing.before.layout, self.crossing.after.layout
        legs = [str(self.first)] if self.first.moves else []
        legs.append(f"{before} ={self.crossing.kind}=> {after}")
        return ", ".join(legs + ([str(self.last)] if self.last.moves else []))


def crossing_kind(before: Layout, after: Layout) -> str | None:
    """Return how to cross between two layouts, or None when more than one count differs.

    >>> crossing_kind(Layout(1, 1, (2,)), Layout(1, 1, (4,)))
    'scatter'
    """
    counts = [*zip((before.replicas, before.values, *before.dims),
                   (after.replicas, after.values, *after.dims), strict=True)]  # fmt: skip
    changed = [place for place, (old, new) in enumerate(counts) if old != new]
    if not changed:
        return "move"
    old, new = counts[changed[0]]
    if len(changed) > 1 or max(old, new) % min(old, new):
        return None
    if changed[0] == 0:
        return "broadcast" if new > old else "move"
    name = "scatter" if new > old else "gather"
    return f"value_{name}" if changed[0] == V else name


def find(
    shape: tuple[int, ...],
    item_bytes: int,
    source_ranks: Ranks,
    source: Placed,
    target_ranks: Ranks,
    target: Placed,
    prices: Prices,
) -> Route | None:
    """Return the cheapest route found from a layout on one group to a layout on another.

    Both groups' layouts are searched exactly; of the placements of one layout that are equally
    near, a few are tried for the crossing. None when the sizes of the groups do not divide each
    other. Raises UsageError for layouts that do not fit.
    """
    check(shape, source_ranks, source)
    check(shape, target_ranks, target)
    if max(source.num_ranks, target.num_ranks) % min(source.num_ranks, target.num_ranks):
        return None
    ranks = tuple(dict.fromkeys(source_ranks + target_ranks))
    places = {rank: place for place, rank in enumerate(ranks)}
    shared = tuple(places[rank] for rank in source_ranks + target_ranks)
    topology = prices.topology(ranks)
    key = (shape, item_bytes, source, target, prices, topology, shared)
    if key not in _routes:
        if len(_routes) >= MOST_KEPT:
            _routes.clear()
        search = _Search(shape, item_bytes, source_ranks, source, target_ranks, target, prices)
        _routes[key] = (ranks, search.run())
    known, route = _routes[key]
    if route is None or known == ranks:
        return route
    return _relabelled(route, dict(zip(known, ranks, strict=True)))


# Routes found before, by everything that decides them, with the ranks they were found for.
_routes: dict[Hashable, tuple[Ranks, Route | None]] = {}


def _relabelled(route: Route, ranks: dict[int, int]) -> Route:
    """Return the route on other ranks of the same topology."""

    def path(old: Path) -> Path:
        return replace(old, ranks=tuple(ranks[rank] for rank in old.ranks))

    old = route.crossing
    crossing = replace(
        old,
        wanted=tuple((ranks[rank], mask) for rank, mask in old.wanted),
        transfers=tuple(
            Transfer(replace(t.holding, rank=ranks[t.holding.rank]), ranks[t.to], t.mask)
            for t in old.transfers
        ),
        groups=tuple(tuple(ranks[rank] for rank in group) for group in old.groups),
    )
    return Route(path(route.first), crossing, path(route.last))


class _Side:
    """The layouts of one group, in order of their distance from (or to) its end of the route."""

    def __init__(self, axes: tuple[int, ...], ranks: Ranks, frontier: Frontier) -> None:
        self.axes = axes
        self.ranks = ranks
        self.frontier = frontier
        self.near: dict[Layout, list[tuple[float, Slots]]] = {}

    def run(self) -> None:
        """Settle every layout."""
        while self.frontier.nearest < math.inf:
            state = self.frontier.settle()
            tried = self.near.setdefault(Placed(self.axes, state).layout, [])
            if len(tried) < _TRIED:
                tried.append((self.frontier.cost[state], state))

    def path(self, state: Slots) -> Path:
        moves = joined(self.frontier.trace(state))
        costs = tuple(self.frontier.price.of(move) for move in moves)
        return Path(self.ranks, self.axes, moves, costs)


class _Search:
    def __init__(
        self,
        shape: tuple[int, ...],
        item_bytes: int,
        source_ranks: Ranks,
        source: Placed,
        target_ranks: Ranks,
        target: Placed,
        prices: Prices,
    ) -> None:
        self.shape = shape
        self.item_bytes = item_bytes
        self.prices = prices

        def side(layout: Placed, other: Placed, ranks: Ranks, *, backward: bool) -> _Side:
            space = room(shape, layout, other)
            price = Pricer(prices, ranks, layout.axes, shape, item_bytes)
            frontier = Frontier(layout.slots, space, price, backward=backward)
            return _Side(layout.axes, ranks, frontier)

        self.left = side(source, target, source_ranks, backward=False)
        self.right = side(target, source, target_ranks, backward=True)

    def run(self) -> Route | None:
        self.left.run()
        self.right.run()
        best: Route | None = None
        for bound, state, other in self._candidates():
            if best is not None and bound >= best.cost:
                break
            crossing = self._cross(state, other)
            route = Route(self.left.path(state), crossing, self.right.path(other))
            if best is None or route.cost < best.cost:
                best = route
        return best

    def _candidates(self) -> Iterator[tuple[float, Slots, Slots]]:
        """Pairs of placements to cross between, with what the route costs at least."""
        found = []
        number = itertools.count()
        for before, states in self.left.near.items():
            for after, others in self.right.near.items():
                if crossing_kind(before, after) is None:
                    continue
                least = self._least(before, after)
                for (cost, state), (more, other) in itertools.product(states, others):
                    found.append((cost + more + least, next(number), state, other))
        for bound, _, state, other in sorted(found):
            yield bound, state, other

    def _least(self, before: Layout, after: Layout) -> float:
        """What a crossing costs at least: one message of its size on the best link there is."""
        if set(self.left.ranks) & set(self.right.ranks):
            return 0.0
        numel = 1
        for size, old, new in zip(self.shape, before.dims, after.dims, strict=True):
            numel *= size // max(old, new)
        return self._nearest(numel * self.item_bytes)

    def _nearest(self, num_bytes: int) -> float:
        return min(self.prices.messages([(a, b, num_bytes)]) for a, b in self._kinds_of_pairs)

    @functools.cached_property
    def _kinds_of_pairs(self) -> list[tuple[int, int]]:
        """One pair of ranks (from, to) for each kind of connection between the groups."""
        found = {
            self.prices.topology((a, b)): (a, b)
            for a, b in itertools.product(self.left.ranks, self.right.ranks)
        }
        return list(found.values())

    def _cross(self, state: Slots, other: Slots) -> Crossing:
        before, after = Placed(self.left.axes, state), Placed(self.right.axes, other)
        kind = crossing_kind(before.layout, after.layout)
        assert kind is not None
        found = transfers(self.shape, self.left.ranks, before, self.right.ranks, after, self.prices)
        wanted = tuple(zip(self.right.ranks, after.masks(self.shape), strict=True))
        messages = [(t.holding.rank, t.to, t.mask.numel * self.item_bytes) for t in found]
        cost = self.prices.messages(messages)
        groups: tuple[Ranks, ...] = ()
        if kind == "broadcast":
            groups = broadcast_groups(found)
            num_bytes = found[0].mask.numel * self.item_bytes
            together = self.prices.collective("broadcast", num_bytes, groups)
            if together < cost:
                cost = together
            else:
                kind, groups = "move", ()
        return Crossing(kind, before, after, wanted, found, groups, cost)


def transfers(
    shape: Sequence[int],
    source_ranks: Ranks,
    before: Placed,
    target_ranks: Ranks,
    after: Placed,
    prices: Prices,
) -> tuple[Transfer, ...]:
    """Return what has to go where for the target group to hold what `after` says."""
    near: dict[tuple[int, int], float] = {}

    def distance(holder: int, to: int) -> float:
        if (holder, to) not in near:
            near[holder, to] = prices.messages([(holder, to, 1 << 16)])
        return near[holder, to]

    # Partial sums are interchangeable: number them as the layouts do.
    held = zip(source_ranks, before.masks(shape), strict=True)
    market = Market([Holding(rank, mask) for rank, mask in held], distance)
    found: list[Transfer] = []
    for rank, mask in zip(target_ranks, after.masks(shape), strict=True):
        pieces, rest = market.cover(mask, rank)
        assert not rest, f"nobody holds {rest[0]}"
        found += pieces
    return tuple(found)


def broadcast_groups(found: Sequence[Transfer]) -> tuple[Ranks, ...]:
    """Return each sender with those it sends to."""
    members: dict[int, list[int]] = {}
    for transfer in found:
        members.setdefault(transfer.holding.rank, [transfer.holding.rank])
        if transfer.to != transfer.holding.rank:
            members[transfer.holding.rank].append(transfer.to)
    return tuple(tuple(group) for group in members.values() if len(group) > 1)
