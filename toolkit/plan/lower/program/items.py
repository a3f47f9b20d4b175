"""What one rank does in a stage, step by step: data that the executor runs and predictions walk.

Values are parts of tensors in the memory of the rank. A segment is a stretch of operators without
communication, and one piece of autograd; moves bring values from rank to rank between segments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from toolkit.ir.graph import Op
from toolkit.plan.lower.program.exchange import Exchange, Slot
from toolkit.plan.program.part import Part
from toolkit.plan.tensors import Box, Mask


class Value(NamedTuple):
    """A part of a tensor: as an operator of the stage `made` it, or as an exchange delivered it."""

    tensor: str
    box: Box
    source: int  # -1 for what the stage itself made, else the stage it came from


# What gradients are added up under: a value, and for one that was delivered its slot.
Key = tuple[Value, tuple[int, ...]]


@dataclass(frozen=True)
class Read:
    """How an input is come by: a part of a source, a value as it is, or put together from several
    that the stage made.
    """

    tensor: str
    mask: Mask
    keys: tuple[Key, ...]  # none for a source
    slot: Slot | None  # of a weight's gradient


@dataclass(frozen=True)
class Call:
    """One part of an operator."""

    op: Op
    part: Part
    reads: tuple[Read, ...]
    writes: tuple[Value, ...]


@dataclass(frozen=True)
class Segment:
    """Calls that are one piece of autograd. `enters` are what it takes of values made before,
    `leaves` what others take of what it makes.

    `unread` are linears (places in `calls`) whose results nothing reads when the segment runs again
    for its backward: then they need not be computed.
    """

    name: int
    calls: tuple[Call, ...]
    enters: tuple[Key, ...]
    leaves: tuple[Value, ...]
    unread: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Move:
    """An exchange that communicates: all of it, or the half on the side of who made the tensor
    (`depart`) or of who reads it (`arrive`).
    """

    name: int
    rank: int
    exchange: Exchange
    half: Literal["all", "depart", "arrive"]


@dataclass(frozen=True)
class Unit:
    """Items whose segments keep nothing: they run again before their backward.

    `needed` are the values that enter; `again[i]` tells whether item i has to run again.
    """

    name: int
    items: tuple[Item, ...]
    needed: tuple[Value, ...]
    again: tuple[bool, ...]
    makes: tuple[Value, ...]

    @cached_property
    def dropped(self) -> tuple[Value, ...]:
        """What is made inside and read nowhere else."""
        inside = dict.fromkeys(value for item in self.items for value in makes_of(item))
        return tuple(value for value in inside if value not in self.makes)


Item = Segment | Move | Unit


@dataclass(frozen=True)
class Script:
    """A stage on one rank: items in the order of forward, arrivals first and departures last."""

    stage: int
    rank: int
    items: tuple[Item, ...]
    learns: bool
    loss: tuple[Value, ...]

    @cached_property
    def last_uses(self) -> tuple[tuple[Value, ...], ...]:
        """After each item: the values that nothing reads any more."""
        last: dict[Value, int] = {}
        for index, item in enumerate(self.items):
            for value in (*reads_of(item), *makes_of(item)):
                last[value] = index
        for value in self.loss:
            last.pop(value, None)
        found: list[list[Value]] = [[] for _ in self.items]
        for value, index in last.items():
            found[index].append(value)
        return tuple(map(tuple, found))


def reads_of(item: Item) -> tuple[Value, ...]:
    """Return the values an item takes."""
    if isinstance(item, Segment):
        return tuple(dict.fromkeys(value for value, _ in item.enters))
    if isinstance(item, Unit):
        return item.needed
    return () if item.half == "arrive" else made_values(item.exchange, item.rank)


def makes_of(item: Item) -> tuple[Value, ...]:
    """Return the values an item gives."""
    if isinstance(item, Segment):
        return item.leaves
    if isinstance(item, Unit):
        return item.makes
    return () if item.half == "depart" else wanted_values(item.exchange, item.rank)


def made_values(exchange: Exchange, rank: int) -> tuple[Value, ...]:
    """Return what a rank puts into an exchange."""
    return tuple(
        dict.fromkeys(
            Value(exchange.tensor, mask.box, -1) for owner, mask in exchange.made if rank == owner
        )
    )


def wanted_values(exchange: Exchange, rank: int) -> tuple[Value, ...]:
    """Return what a rank gets of an exchange."""
    return tuple(
        dict.fromkeys(
            Value(exchange.tensor, mask.box, exchange.source)
            for owner, mask in exchange.wanted
            if rank == owner
        )
    )


def moves(items: Sequence[Item]) -> Iterator[tuple[Move, bool]]:
    """Yield the moves of a forward pass in order: (move, False)."""
    for item in items:
        if isinstance(item, Move):
            yield item, False
        elif isinstance(item, Unit):
            yield from moves(item.items)


def backward_moves(items: Sequence[Item]) -> Iterator[tuple[Move, bool]]:
    """Yield the moves of a backward pass in order; True for those of gradients, False for those
    of units that run again.
    """
    for item in reversed(items):
        if isinstance(item, Move):
            if item.exchange.backward is not None:
                yield item, True
        elif isinstance(item, Unit):
            for inner, again in zip(item.items, item.again, strict=True):
                if again and isinstance(inner, Move):
                    yield inner, False
                elif again and isinstance(inner, Unit):
                    yield from moves(inner.items)
            yield from backward_moves(item.items)
