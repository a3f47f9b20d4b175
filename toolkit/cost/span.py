"""Span: what a set of ranks has to talk through, inside its machines and between them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from toolkit.hardware.cluster import Cluster


@dataclass(frozen=True)
class Span:
    """What a set of ranks has to talk through: inside its machines, and between them.

    `bandwidth_in` and `bandwidth_out` are those of one rank while all ranks send at once; `exit` is
    what one machine can send to the others. Where machines differ, the slowest decides.
    """

    num_ranks: int
    num_nodes: int
    per_node: int  # ranks on the fullest machine
    uniform: bool  # whether every machine holds as many
    latency_in: float
    bandwidth_in: float
    link_in: str
    latency_out: float = 0.0
    bandwidth_out: float = math.inf
    exit: float = math.inf
    link_out: str = ""

    @property
    def latency(self) -> float:
        """Alpha of a step in which every rank sends to a neighbour."""
        return max(self.latency_in, self.latency_out)

    @property
    def ring_bandwidth(self) -> float:
        """What every edge of a ring in machine order carries: one edge leaves each machine."""
        return min(self.bandwidth_in, self.exit)

    @property
    def inner(self) -> Span:
        """The ranks of one machine."""
        return Span(
            self.per_node, 1, self.per_node, True, self.latency_in, self.bandwidth_in, self.link_in
        )

    @property
    def outer(self) -> Span:
        """One rank of every machine, while the others of each machine do the same beside it."""
        return Span(
            self.num_nodes, 1, self.num_nodes, True,
            self.latency_out, self.bandwidth_out, self.link_out,
        )  # fmt: skip


@functools.lru_cache(maxsize=16384)
def span(ranks: tuple[int, ...], cluster: Cluster, concurrent: int = 1) -> Span:
    """Return what `ranks` have to talk through, while `concurrent` like groups share the ports."""
    machines = cluster.by_node(ranks)
    counts = [len(places) for places in machines.values()]
    latency_in, bandwidth_in, link_in = 0.0, math.inf, ""
    for places in machines.values():
        if len(places) > 1:
            node = places[0].node
            link = node.among(tuple(place.local for place in places))
            users = len(places) * concurrent if link.shared else 1
            rate = link.effective_bandwidth / min(users, max(node.num_devices, len(places)))
            latency_in = max(latency_in, link.latency_s)
            if rate < bandwidth_in:
                bandwidth_in, link_in = rate, link.name
    num_nodes, per_node = len(machines), max(counts)
    uniform = min(counts) == per_node
    if num_nodes == 1:
        return Span(len(ranks), 1, per_node, uniform, latency_in, bandwidth_in, link_in)
    level = cluster.level(machines)
    latency_out, bandwidth_out, exit_rate, link_out = 0.0, math.inf, math.inf, ""
    for places in machines.values():
        node = places[0].node
        assert node.nic is not None
        port = node.nic.effective_bandwidth / level.oversubscription
        active = min(len(places) * concurrent, node.num_devices)
        # A device drives the ports beside it, not those of the others.
        own = port * max(1, node.num_nics // node.num_devices)
        rate = min(own, port * node.num_nics / active)
        latency_out = max(latency_out, node.nic.latency_s + level.latency_s)
        if rate < bandwidth_out:
            bandwidth_out, link_out = rate, node.nic.name
        exit_rate = min(exit_rate, rate * len(places))
    return Span(
        len(ranks), num_nodes, per_node, uniform, latency_in, bandwidth_in, link_in,
        latency_out, bandwidth_out, exit_rate, link_out,
    )  # fmt: skip
