"""Node: one machine of a cluster, its devices and how they are wired to each other."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal, get_args

from toolkit.errors import UsageError
from toolkit.hardware.device import Device
from toolkit.hardware.link import Link

Topology = Literal["switch", "mesh", "wires", "shared"]


@dataclass(frozen=True)
class CollectiveFit:
    """A measured collective: `latency_s + num_bytes / bandwidth`, num_bytes of the full tensor."""

    kind: str
    num_ranks: int
    latency_s: float
    bandwidth: float
    smallest_bytes: int
    largest_bytes: int
    median_error: float  # of the line against its own measurements, relative
    max_error: float

    def seconds(self, num_bytes: float) -> float:
        return self.latency_s + num_bytes / self.bandwidth


@dataclass(frozen=True)
class Node:
    """A machine: `num_devices` of one device and the links among them.

    `topology`: "switch" gives each device one port of `link`; "mesh" one `link` between every two;
    "wires" lists (device, device, how many links); "shared" is one medium divided among all.
    Devices without a direct path use `host_link`. `nic` is one of `num_nics` ports to the network.
    `host` is the CPUs and memory that hold the devices, as one device (None: not known).
    """

    name: str
    device: Device
    num_devices: int
    topology: Topology
    link: Link
    host_link: Link | None = None
    host: Device | None = None
    nic: Link | None = None
    num_nics: int = 0
    wires: tuple[tuple[int, int, int], ...] = ()
    source: str = ""
    measured: tuple[CollectiveFit, ...] = ()

    def __post_init__(self) -> None:
        if self.topology not in get_args(Topology):
            raise UsageError(
                f"machine {self.name!r}: topology {self.topology!r} is unknown",
                remedy=f"use one of: {', '.join(get_args(Topology))}",
            )
        if self.num_devices < 1 or self.num_nics < 0 or (self.nic is None) != (self.num_nics == 0):
            raise UsageError(
                f"machine {self.name!r}: needs devices, and a nic exactly when num_nics > 0"
            )
        if (self.topology == "wires") != bool(self.wires):
            raise UsageError(f'machine {self.name!r}: `wires` belongs to topology "wires"')
        for first, second, count in self.wires:
            inside = 0 <= first < self.num_devices and 0 <= second < self.num_devices
            if not inside or first == second or count < 1:
                raise UsageError(
                    f"machine {self.name!r}: wire {[first, second, count]} does not join two of "
                    f"its {self.num_devices} devices"
                )

    def graph(self) -> Any:
        """Return the wiring as a networkx Graph; edges carry `bandwidth` in B/s per direction.

        Nodes 0..num_devices-1 are devices; "switch" joins those with a port (also for a shared
        medium, whose ports then all draw on one bandwidth).
        """
        import networkx as nx

        graph = nx.Graph(name=self.name)
        graph.add_nodes_from(range(self.num_devices))
        rate = self.link.effective_bandwidth
        if self.topology in ("switch", "shared"):
            graph.add_edges_from(
                ((device, "switch") for device in range(self.num_devices)), bandwidth=rate
            )
        elif self.topology == "mesh":
            graph.add_edges_from(
                ((first, second) for first in range(self.num_devices) for second in range(first)),
                bandwidth=rate,
            )
        for first, second, count in self.wires:
            graph.add_edge(first, second, bandwidth=rate * count)
        return graph

    def path(self, first: int, second: int) -> Link:
        """Return the link that a message between two devices of this machine takes."""
        if self.topology != "wires":
            return self.link
        count = sum(n for a, b, n in self.wires if {a, b} == {first, second})
        if count:
            return Link(
                self.link.name,
                self.link.bandwidth * count,
                self.link.latency_s,
                self.link.efficiency,
                source=self.link.source,
            )
        return self._host()

    def among(self, devices: tuple[int, ...]) -> Link:
        """Return the link of one device while all `devices` exchange data in rings at once.

        Its bandwidth is the smallest cut that separates any of them from the others (by Menger's
        theorem no set of rings sends more), through wires and switches but not through other
        devices. Where direct wires do not connect them all, every one takes the host link.
        """
        return _among(self, tuple(sorted(set(devices))))

    def _host(self) -> Link:
        if self.host_link is None:
            raise UsageError(
                f"machine {self.name!r}: some devices have no wire between them",
                remedy="give it a host_link",
            )
        return self.host_link


@functools.lru_cache(maxsize=4096)
def _among(node: Node, devices: tuple[int, ...]) -> Link:
    if len(devices) < 2 or node.topology in ("switch", "shared"):
        return node.link
    import networkx as nx

    part = node.graph().subgraph(devices)
    if not nx.is_connected(part):
        return node._host()
    cut, _ = nx.stoer_wagner(part, weight="bandwidth")
    link = node.link
    return Link(link.name, cut / link.efficiency, link.latency_s, link.efficiency)
