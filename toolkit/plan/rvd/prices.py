"""Prices: what a move costs. Seconds on a cluster, or the element count of the published system."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from toolkit.cost import collective
from toolkit.hardware.cluster import Cluster
from toolkit.plan.rvd.moves import LOCAL

Ranks = tuple[int, ...]
Message = tuple[int, int, int]  # from rank, to rank, bytes


class Prices(Protocol):
    """How a search compares moves. All costs are at least 0 and in one unit."""

    @property
    def local_is_free(self) -> bool:
        """Whether moves inside the ranks' memories cost nothing."""
        ...

    def collective(self, kind: str, num_bytes: int, groups: Sequence[Ranks]) -> float:
        """Cost of one move that runs in all `groups` at once; `num_bytes` is one group's tensor."""
        ...

    def messages(self, messages: Iterable[Message]) -> float:
        """Cost of messages that are all sent at once."""
        ...

    def topology(self, ranks: Ranks) -> Hashable:
        """Groups of ranks with equal topology, place by place, have equal costs."""
        ...


@dataclass(frozen=True)
class AlphaBeta:
    """Predicted seconds, by `cost.collective` on the ranks' own links.

    Local moves cost nothing: they are copies in memory, which the operator model counts.
    """

    cluster: Cluster
    _seen: dict[Hashable, float] = field(default_factory=dict, repr=False, compare=False)
    _places: dict[int, tuple[int, tuple[int, int]]] = field(
        default_factory=dict, repr=False, compare=False
    )
    _shapes: dict[Ranks, Hashable] = field(default_factory=dict, repr=False, compare=False)

    @property
    def local_is_free(self) -> bool:
        return True

    def collective(self, kind: str, num_bytes: int, groups: Sequence[Ranks]) -> float:
        """Seconds of the slowest group, while the others share its machines' ports."""
        if kind in LOCAL:
            return 0.0
        machines = [{self._place(rank)[0] for rank in group} for group in groups]
        users: dict[int, int] = {}
        for nodes in machines:
            for node in nodes:
                users[node] = users.get(node, 0) + 1
        slowest = 0.0
        done: set[Hashable] = set()
        for group, nodes in zip(groups, machines, strict=True):
            concurrent = max(users[node] for node in nodes)
            key = (kind, num_bytes, self._shape(group), concurrent)
            if key not in done:
                done.add(key)
                if key not in self._seen:
                    self._seen[key] = collective.cost(
                        kind, num_bytes, group, self.cluster, concurrent=concurrent
                    ).seconds
                slowest = max(slowest, self._seen[key])
        return slowest

    def messages(self, messages: Iterable[Message]) -> float:
        """Seconds until the busiest rank has sent and received its messages, one after another.

        Ranks of one machine that send away from it at once share its ports.
        """
        sent = [message for message in messages if message[0] != message[1]]
        leaving: dict[int, set[int]] = {}
        for source, target, _ in sent:
            here, there = self._place(source)[0], self._place(target)[0]
            if here != there:
                leaving.setdefault(here, set()).add(source)
                leaving.setdefault(there, set()).add(target)
        busy: dict[tuple[str, int], float] = {}
        for source, target, num_bytes in sent:
            here, there = self._place(source)[0], self._place(target)[0]
            concurrent = max(len(leaving[here]), len(leaving[there])) if here != there else 1
            key = ("send", num_bytes, self._shape((source, target)), concurrent)
            if key not in self._seen:
                self._seen[key] = collective.cost(
                    "send", num_bytes, (source, target), self.cluster, concurrent=concurrent
                ).seconds
            for end in (("out", source), ("in", target)):
                busy[end] = busy.get(end, 0.0) + self._seen[key]
        return max(busy.values(), default=0.0)

    def topology(self, ranks: Ranks) -> Hashable:
        """Machines by order of appearance (as they are, where the network has several levels),
        and the devices inside where wires tell them apart.
        """
        single = len(self.cluster.network) == 1
        first: dict[int, int] = {}
        found = []
        for rank in ranks:
            node, what = self._place(rank)
            found.append((first.setdefault(node, len(first)) if single else node, what))
        return tuple(found)

    def _place(self, rank: int) -> tuple[int, tuple[int, int]]:
        """(machine, (kind of machine, device in it)); only wires tell devices apart."""
        if rank not in self._places:
            place = self.cluster.place(rank)
            group = next(i for i, g in enumerate(self.cluster.groups) if g.node is place.node)
            local = place.local if place.node.topology == "wires" else -1
            self._places[rank] = (place.node_index, (group, local))
        return self._places[rank]

    def _shape(self, ranks: Ranks) -> Hashable:
        """What decides the cost of a collective among `ranks`."""
        found = self._shapes.get(ranks)
        if found is None:
            by_node: dict[int, list[tuple[int, int]]] = {}
            for rank in ranks:
                node, what = self._place(rank)
                by_node.setdefault(node, []).append(what)
            alike = tuple(sorted(tuple(sorted(held)) for held in by_node.values()))
            found = self._shapes[ranks] = (alike, self.cluster.level(by_node).name)
        return found


@dataclass(frozen=True)
class Volume:
    """Elements each rank sends in a ring, plus one a hop: how nnScaler 0.8 compares paths.

    The factor 100 by which that release avoids reduce-scatters is left out.
    """

    item_bytes: int

    @property
    def local_is_free(self) -> bool:
        return False

    def collective(self, kind: str, num_bytes: int, groups: Sequence[Ranks]) -> float:
        if kind in LOCAL:
            return 1.0
        count = len(groups[0])
        numel = num_bytes / self.item_bytes
        passed = {"all_reduce": 2.0, "all_to_all": 1.0 / count, "broadcast": float(count)}
        return passed.get(kind, 1.0) * numel * (count - 1) / count + 1

    def messages(self, messages: Iterable[Message]) -> float:
        """The most elements any rank sends or receives, plus one."""
        busy: dict[tuple[str, int], int] = {}
        for source, target, num_bytes in messages:
            if source != target:
                for end in (("out", source), ("in", target)):
                    busy[end] = busy.get(end, 0) + num_bytes
        return max(busy.values(), default=0) / self.item_bytes + 1

    def topology(self, ranks: Ranks) -> Hashable:
        return len(ranks)
