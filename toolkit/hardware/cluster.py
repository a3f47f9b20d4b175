"""Cluster: machines joined by a network. Ranks count devices machine by machine."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from toolkit.errors import UsageError
from toolkit.hardware.device import Device
from toolkit.hardware.link import Link
from toolkit.hardware.node import Node


@dataclass(frozen=True)
class Group:
    """`count` identical machines."""

    node: Node
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"a group needs at least one {self.node.name}, not {self.count}")

    @property
    def num_devices(self) -> int:
        return self.node.num_devices * self.count


@dataclass(frozen=True)
class Level:
    """A level of the network. Domains of `num_nodes` machines (None: all) talk through it.

    Crossing it adds `latency_s`, and divides what leaves a machine by `oversubscription`.
    """

    name: str = "network"
    num_nodes: int | None = None
    latency_s: float = 0.0
    oversubscription: float = 1.0

    def __post_init__(self) -> None:
        if self.latency_s < 0 or self.oversubscription < 1:
            raise UsageError(
                f"network level {self.name!r}: needs latency_s >= 0 and oversubscription >= 1, not "
                f"{self.latency_s} and {self.oversubscription}"
            )


@dataclass(frozen=True)
class Place:
    """Where a rank is: which machine of the cluster, and which device of that machine."""

    node_index: int
    local: int
    node: Node


@dataclass(frozen=True)
class Cluster:
    """Groups of machines, in rank order, and the network's levels from the inside out."""

    name: str
    groups: tuple[Group, ...]
    network: tuple[Level, ...] = (Level(),)
    _first_ranks: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _first_nodes: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.groups:
            raise UsageError(f"cluster {self.name!r} has no machines")
        ranks = itertools.accumulate((group.num_devices for group in self.groups), initial=0)
        nodes = itertools.accumulate((group.count for group in self.groups), initial=0)
        object.__setattr__(self, "_first_ranks", tuple(ranks))
        object.__setattr__(self, "_first_nodes", tuple(nodes))
        sizes = [level.num_nodes for level in self.network]
        inner = sizes[:-1]
        if not sizes or sizes[-1] is not None or None in inner or inner != sorted(set(inner)):  # type: ignore[type-var]
            raise UsageError(
                f"cluster {self.name!r}: network levels need growing num_nodes, and none on the "
                f"last, which joins everything; got {sizes}"
            )
        if self.num_nodes > 1 and any(group.node.nic is None for group in self.groups):
            names = {group.node.name for group in self.groups if group.node.nic is None}
            raise UsageError(
                f"cluster {self.name!r}: {', '.join(sorted(names))} has no nic to join the others"
            )

    @property
    def num_devices(self) -> int:
        return self._first_ranks[-1]

    @property
    def num_nodes(self) -> int:
        return self._first_nodes[-1]

    @property
    def ranks(self) -> range:
        return range(self.num_devices)

    @property
    def is_homogeneous(self) -> bool:
        """Whether every device is the same."""
        return len({group.node.device for group in self.groups}) == 1

    def place(self, rank: int) -> Place:
        """Return where `rank` is; UsageError when the cluster has no such rank."""
        if not 0 <= rank < self.num_devices:
            raise UsageError(
                f"cluster {self.name} has no rank {rank}; its ranks are 0 to {self.num_devices - 1}"
            )
        index = bisect.bisect_right(self._first_ranks, rank) - 1
        node = self.groups[index].node
        which, local = divmod(rank - self._first_ranks[index], node.num_devices)
        return Place(self._first_nodes[index] + which, local, node)

    def device(self, rank: int) -> Device:
        """Return the device of `rank`."""
        return self.place(rank).node.device

    def kinds(self, ranks: range) -> tuple[Node, ...]:
        """Return the distinct machines that consecutive `ranks` are on; UsageError as `place`."""
        self.place(ranks[-1])
        first, last = (bisect.bisect_right(self._first_ranks, r) for r in (ranks[0], ranks[-1]))
        return tuple(dict.fromkeys(group.node for group in self.groups[first - 1 : last]))

    def by_node(self, ranks: Iterable[int]) -> dict[int, tuple[Place, ...]]:
        """Return the places of `ranks`, keyed by machine, in the order they first appear."""
        found: dict[int, list[Place]] = {}
        for rank in ranks:
            place = self.place(rank)
            found.setdefault(place.node_index, []).append(place)
        return {index: tuple(places) for index, places in found.items()}

    def level(self, nodes: Iterable[int]) -> Level:
        """Return the innermost network level whose domains hold all these machines."""
        indices = list(nodes)
        low, high = min(indices), max(indices)
        for level in self.network:
            if level.num_nodes is None or low // level.num_nodes == high // level.num_nodes:
                return level
        raise AssertionError("the outermost level joins all machines")

    def path(self, first: int, second: int) -> Link:
        """Return the link a message from one rank to another takes, as one latency and bandwidth.

        Between machines that is one port of the slower side, at the network level that joins them.
        """
        here, there = self.place(first), self.place(second)
        if first == second:
            raise UsageError(f"rank {first} needs no link to itself")
        if here.node_index == there.node_index:
            return here.node.path(here.local, there.local)
        level = self.level((here.node_index, there.node_index))
        one, other = here.node.nic, there.node.nic
        assert one is not None
        assert other is not None
        slow = min(one, other, key=lambda nic: nic.effective_bandwidth)
        return Link(
            slow.name,
            slow.bandwidth / level.oversubscription,
            max(one.latency_s, other.latency_s) + level.latency_s,
            slow.efficiency,
            source=slow.source,
        )
