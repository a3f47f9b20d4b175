"""The scheduling problem: blocks that occupy devices for a time, hold memory, and wait for others.

SuperScaler's second phase (arXiv 2301.08984, section 4: op-assign and op-order) in the form of
Tessel (Lin et al., HPCA 2024): placement is given, the order is what is sought.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from toolkit.errors import UsageError
from toolkit.plan.order.action import Action


class Edge(NamedTuple):
    """A block must end, and `delay` pass (its result travels), before the next may start."""

    source: Action
    delay: float = 0.0


@dataclass(frozen=True)
class Block:
    """An action that occupies all of `devices` for `span` units of time.

    `memory` is what it adds to each of its devices: an increase counts from its start, a decrease
    from its end.
    """

    action: Action
    devices: tuple[int, ...]
    span: float
    memory: float = 0.0
    after: tuple[Edge, ...] = ()

    @property
    def slot(self) -> tuple[int, str]:
        """(stage, kind): what is the same for every microbatch."""
        return self.action.stage, self.action.kind

    def __str__(self) -> str:
        return str(self.action)


@dataclass(frozen=True)
class Problem:
    """Blocks to be run on `num_devices` devices, none ever holding more than `memory_limit`."""

    blocks: tuple[Block, ...]
    num_devices: int
    memory_limit: float = math.inf

    def __post_init__(self) -> None:
        """Raise UsageError unless names, devices, spans and dependencies make sense."""
        names: set[Action] = set()
        for block in self.blocks:
            if block.action in names:
                raise UsageError(f"block {block} is there twice")
            names.add(block.action)
            # Strictly increasing and within range: neither empty nor twice the same.
            if not block.devices or list(block.devices) != sorted(set(block.devices)):
                raise UsageError(f"block {block} names devices {block.devices}; give each once")
            if block.devices[0] < 0 or block.devices[-1] >= self.num_devices:
                raise UsageError(
                    f"block {block} is on devices {block.devices}; "
                    f"there are devices 0 to {self.num_devices - 1}"
                )
            if not (math.isfinite(block.span) and block.span > 0):
                raise UsageError(f"block {block} has span {block.span}; it must be above 0")
            if block.memory > self.memory_limit:
                raise UsageError(
                    f"block {block} alone adds {block.memory:g} of memory; "
                    f"the limit is {self.memory_limit:g}"
                )
        for block in self.blocks:
            for edge in block.after:
                if edge.source not in names:
                    raise UsageError(f"block {block} waits for {edge.source}, which is no block")
                if not (math.isfinite(edge.delay) and edge.delay >= 0):
                    raise UsageError(
                        f"{edge.source} reaches {block} after {edge.delay}; not below 0"
                    )
        self.topological  # noqa: B018 -- raises when blocks wait for one another in a circle

    @cached_property
    def index(self) -> dict[Action, int]:
        """Each action's place in `blocks`."""
        return {block.action: i for i, block in enumerate(self.blocks)}

    @cached_property
    def sources(self) -> tuple[tuple[tuple[int, float], ...], ...]:
        """For each block, (place, delay) of those it waits for."""
        index = self.index
        return tuple(
            tuple((index[edge.source], edge.delay) for edge in block.after) for block in self.blocks
        )

    @cached_property
    def users(self) -> tuple[tuple[tuple[int, float], ...], ...]:
        """For each block, (place, delay) of those that wait for it."""
        found: list[list[tuple[int, float]]] = [[] for _ in self.blocks]
        for i, sources in enumerate(self.sources):
            for source, delay in sources:
                found[source].append((i, delay))
        return tuple(map(tuple, found))

    @cached_property
    def topological(self) -> tuple[int, ...]:
        """Places of the blocks, each after those it waits for. Raises UsageError on a circle."""
        missing = [len(sources) for sources in self.sources]
        order = [i for i, count in enumerate(missing) if count == 0]
        for i in order:
            for user, _ in self.users[i]:
                missing[user] -= 1
                if missing[user] == 0:
                    order.append(user)
        if len(order) < len(self.blocks):
            raise UsageError(
                f"blocks wait for one another: {' -> '.join(map(str, self._circle()))}"
            )
        return tuple(order)

    def _circle(self) -> list[Action]:
        import networkx as nx

        graph = nx.DiGraph(
            (edge.source, block.action) for block in self.blocks for edge in block.after
        )
        circle = [source for source, _ in nx.find_cycle(graph)]
        return [*circle, circle[0]]

    @cached_property
    def on_device(self) -> tuple[tuple[int, ...], ...]:
        """Places of the blocks of each device."""
        found: list[list[int]] = [[] for _ in range(self.num_devices)]
        for i, block in enumerate(self.blocks):
            for device in block.devices:
                found[device].append(i)
        return tuple(map(tuple, found))

    @cached_property
    def heads(self) -> tuple[float, ...]:
        """The time before each block: the longest way to its start, with devices for everyone."""
        found = [0.0] * len(self.blocks)
        for i in self.topological:
            for source, delay in self.sources[i]:
                found[i] = max(found[i], found[source] + self.blocks[source].span + delay)
        return tuple(found)

    @cached_property
    def tails(self) -> tuple[float, ...]:
        """The time after each block: the longest way from its end."""
        found = [0.0] * len(self.blocks)
        for i in reversed(self.topological):
            for user, delay in self.users[i]:
                found[i] = max(found[i], delay + self.blocks[user].span + found[user])
        return tuple(found)

    def busy(self, device: int) -> float:
        """The time that the blocks of `device` take together."""
        return sum(self.blocks[i].span for i in self.on_device[device])

    def slots(self) -> Iterator[tuple[int, str]]:
        """Yield every (stage, kind) once, in the order of the blocks."""
        yield from dict.fromkeys(block.slot for block in self.blocks)

    def repeat(self, num_microbatches: int) -> Problem:
        """Return this problem of one microbatch for microbatches 0, 1, ...

        >>> one = Problem((Block(Action(0, "F", 0), (0,), 1.0),), 1)
        >>> [str(block) for block in one.repeat(3).blocks]
        ['0F0', '0F1', '0F2']
        """
        numbers = {block.action.microbatch for block in self.blocks}
        if len(numbers) != 1:
            raise UsageError(f"only one microbatch can be repeated; these are {sorted(numbers)}")
        return replace(
            self,
            blocks=tuple(
                _moved(block, microbatch)
                for microbatch in range(num_microbatches)
                for block in self.blocks
            ),
        )

    def reversed(self) -> Problem:
        """Return the problem with time running backwards: a schedule's cool-down is the warm-up
        of the reversed one. What a block freed, it now takes.
        """
        after: dict[Action, list[Edge]] = {block.action: [] for block in self.blocks}
        for block in self.blocks:
            for edge in block.after:
                after[edge.source].append(Edge(block.action, edge.delay))
        return replace(
            self,
            blocks=tuple(
                replace(block, memory=-block.memory, after=tuple(after[block.action]))
                for block in reversed(self.blocks)
            ),
        )


def _moved(block: Block, microbatch: int) -> Block:
    return replace(
        block,
        action=block.action._replace(microbatch=microbatch),
        after=tuple(
            Edge(edge.source._replace(microbatch=microbatch), edge.delay) for edge in block.after
        ),
    )


def names(blocks: Iterable[object], most: int = 8) -> str:
    """Return the first `most` of `blocks` for a message, and how many are left out.

    >>> names(["0F0", "0F1", "0F2"], most=2)
    '0F0, 0F1 and 1 more'
    """
    shown = [str(block) for block in blocks]
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more
