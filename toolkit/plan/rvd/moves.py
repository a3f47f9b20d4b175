"""Moves: one transition between two layouts of the same group.

| from | to | move            | | from | to | move                               |
|------|----|-----------------|-|------|----|------------------------------------|
| D    | R  | all_gather      | | R    | D  | slice, local                       |
| V    | R  | all_reduce      | | R    | V  | vslice, local: one rank keeps it   |
| D    | D' | all_to_all      | | D    | V  | pad, local: zeros around the slice |
| V    | D  | reduce_scatter  | |      |    |                                    |

and `permute`, which keeps the counts and changes who holds what, by sends. `pad` and `permute` are
ours; the others are the paper's. A move may take several axes at once: the all-reduce over a
flattened mesh is one move, so that no pass has to merge nested ones.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from toolkit.plan.rvd.layouts import D, R, Slots, V, groups

Kind = Literal[
    "all_gather", "all_reduce", "all_to_all", "reduce_scatter", "slice", "vslice", "pad", "permute"
]
LOCAL: frozenset[str] = frozenset({"slice", "vslice", "pad"})
_KINDS: tuple[tuple[Kind, ...], ...] = (  # from R, V, D to R, V, D
    ("permute", "vslice", "slice"),
    ("all_reduce", "permute", "reduce_scatter"),
    ("all_gather", "pad", "all_to_all"),
)
# Instead of slots: two axes of one size change places; the axes of one dim change their order.
SWAP, REORDER = -1, -2


@dataclass(frozen=True)
class Move:
    """From layout to layout: `kind` over each of the groups along `axes`.

    `dim` is where slices are gathered from or cut; an all_to_all gathers `dim` and cuts `to_dim`.
    For a permute, `pairs` are the positions (from, to) that send.
    """

    kind: Kind
    axes: tuple[int, ...]
    dim: int | None
    to_dim: int | None
    before: Slots
    after: Slots
    pairs: tuple[tuple[int, int], ...] = ()


def kind(source: int, target: int) -> Kind:
    """Return the move that takes axes from one slot to another (-1: to other places).

    >>> kind(V, D), kind(D, R), kind(D, D + 1)
    ('reduce_scatter', 'all_gather', 'all_to_all')
    """
    return "permute" if source < 0 else _KINDS[min(source, D)][min(target, D)]


class Neighbour(NamedTuple):
    """A layout one move away: `order` of the axes that go from slot `source` to slot `target`.

    Read backwards, from `target` to `source`, it is the move from there.
    """

    source: int
    target: int
    order: tuple[int, ...]
    together: tuple[int, ...]  # the same axes, sorted
    other: Slots


@dataclass(frozen=True)
class Space:
    """Layouts on a grid in which the number of slices along each dim divides `limits`, with
    partial sums if `values`.
    """

    axes: tuple[int, ...]
    limits: tuple[int, ...]
    values: bool
    _known: dict[Slots, tuple[Neighbour, ...]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def neighbours(self, state: Slots) -> tuple[Neighbour, ...]:
        """Return every layout one move from (or to) `state`."""
        found = self._known.get(state)
        if found is None:
            found = (*self._transitions(state), *self._permutations(state))
            self._known[state] = found
        return found

    def _transitions(self, state: Slots) -> Iterator[Neighbour]:
        targets = self._targets(state)
        for source, slot in enumerate(state):
            for count in range(1, len(slot) + 1):
                # Any axes can leave R and V together, of a dim only the innermost.
                takes = itertools.combinations(slot, count) if source < D else [slot[-count:]]
                for taken in takes:
                    parts = math.prod([self.axes[axis] for axis in taken])
                    together = tuple(sorted(taken))
                    left = tuple([axis for axis in slot if axis not in taken])
                    for target, room in targets:
                        if target == source or room % parts:
                            continue
                        # To a dim they come in any order from R or V, as they were from a dim.
                        free = source < D <= target and count > 1
                        for order in itertools.permutations(taken) if free else [taken]:
                            joined = (*state[target], *order)
                            other = list(state)
                            other[source] = left
                            other[target] = joined if target >= D else tuple(sorted(joined))
                            yield Neighbour(source, target, order, together, tuple(other))

    def _targets(self, state: Slots) -> list[tuple[int, int]]:
        """Slots that axes can go to, and by how much the number of slices there may still grow."""
        everything = math.prod(self.axes)
        found = [(R, everything), (V, everything)] if self.values else [(R, everything)]
        for dim, limit in enumerate(self.limits):
            held = math.prod([self.axes[axis] for axis in state[D + dim]])
            found.append((D + dim, limit // held))
        return found

    def _permutations(self, state: Slots) -> Iterator[Neighbour]:
        """Two axes of one size change places, or the axes of one dim their order."""
        where = {axis: place for place, slot in enumerate(state) for axis in slot}
        for one, two in itertools.combinations(range(len(self.axes)), 2):
            if self.axes[one] == self.axes[two] and not where[one] == where[two] < D:
                swap = {one: two, two: one}
                other = list(state)
                for place in {where[one], where[two]}:
                    slot = tuple([swap.get(axis, axis) for axis in state[place]])
                    other[place] = slot if place >= D else tuple(sorted(slot))
                yield Neighbour(SWAP, SWAP, (one, two), (one, two), tuple(other))
        for place in range(D, len(state)):
            slot = state[place]
            if len({self.axes[axis] for axis in slot}) > 1:
                for order in itertools.permutations(slot):
                    if order != slot:
                        other = [*state[:place], order, *state[place + 1 :]]
                        together = tuple(sorted(slot))
                        yield Neighbour(REORDER, REORDER, order, together, tuple(other))

    def move(self, state: Slots, step: Neighbour, *, backward: bool = False) -> Move:
        """Return the move from `state` to a neighbour or, `backward`, from the neighbour to it."""
        ends = (step.other, state) if backward else (state, step.other)
        if step.source < 0:
            sends = pairs(self.axes, step.source, step.together, *ends)
            return Move("permute", step.together, None, None, *ends, sends)
        source, target = (step.target, step.source) if backward else (step.source, step.target)
        found = kind(source, target)
        dim = (source if source >= D else target) - D
        to_dim = target - D if found == "all_to_all" else None
        return Move(found, step.order, dim if dim >= 0 else None, to_dim, *ends)


@functools.lru_cache(maxsize=1024)
def space(axes: tuple[int, ...], limits: tuple[int, ...], values: bool) -> Space:
    """Return the space, the same one for equal arguments: it remembers its neighbours."""
    return Space(axes, limits, values)


def pairs(
    axes: tuple[int, ...], how: int, together: tuple[int, ...], before: Slots, after: Slots
) -> tuple[tuple[int, int], ...]:
    """Return who sends to whom (positions) when `together` are swapped or reordered."""
    if how == SWAP:
        return _exchange(axes, *together)
    place = next(i for i in range(D, len(before)) if set(before[i]) == set(together))
    return _reorder(axes, before[place], after[place])


@functools.lru_cache(maxsize=4096)
def _exchange(axes: tuple[int, ...], one: int, two: int) -> tuple[tuple[int, int], ...]:
    size = axes[one]
    return tuple(
        (members[j * size + i], members[i * size + j])
        for members in groups(axes, (one, two))
        for i, j in itertools.permutations(range(size), 2)
    )


@functools.lru_cache(maxsize=4096)
def _reorder(
    axes: tuple[int, ...], before: tuple[int, ...], after: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    return tuple(
        (holder, wants)
        for old, new in zip(groups(axes, before), groups(axes, after), strict=True)
        for holder, wants in zip(old, new, strict=True)
        if holder != wants
    )


def joined(moves: Sequence[Move]) -> tuple[Move, ...]:
    """Return the moves with local ones of one kind and dim that follow each other put together."""
    found: list[Move] = []
    for move in moves:
        last = found[-1] if found else None
        if last and move.kind in LOCAL and (last.kind, last.dim) == (move.kind, move.dim):
            # A slice cuts further inside, a pad takes what lies further outside.
            axes = (*move.axes, *last.axes) if move.kind == "pad" else (*last.axes, *move.axes)
            found[-1] = Move(move.kind, axes, move.dim, None, last.before, move.after)
        else:
            found.append(move)
    return tuple(found)


def full_bytes(kind_: str, num_members: int, local_bytes: int) -> int:
    """Return the size of the full tensor of one of a move's groups, as collective.cost means it:
    what the group holds after gathering, before scattering, or exchanges all to all.
    """
    return local_bytes * num_members if kind_ in ("all_gather", "all_to_all") else local_bytes


def local_numel(shape: Sequence[int], axes: tuple[int, ...], state: Slots) -> int:
    """Return how many elements one rank holds in a layout."""
    return math.prod(shape) // math.prod(axes[axis] for slot in state[D:] for axis in slot)
