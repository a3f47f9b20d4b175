"""Where a mesh lies on a cluster: its positions along the pipeline, and what moving data between
and inside them takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

from toolkit.cost.calibration import Calibration
from toolkit.hardware import Cluster
from toolkit.hardware.device import Device
from toolkit.plan.order.action import Rows
from toolkit.plan.plan import Axis as MeshAxis
from toolkit.plan.plan import AxisName, How, Offload, Plan
from toolkit.plan.predict.costs import Costs
from toolkit.plan.search.layouts import Axis
from toolkit.plan.subject import Subject

_AXES: tuple[AxisName, ...] = ("pipeline", "replica", "data", "context", "tensor")


class Mesh(NamedTuple):
    """Sizes of the axes, slowest first."""

    pipeline: int = 1
    replica: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def num_ranks(self) -> int:
        return math.prod(self)

    @property
    def inner(self) -> int:
        """Ranks that share the operators of one replica of a stage."""
        return self.context * self.tensor

    @property
    def axes(self) -> tuple[MeshAxis, ...]:
        """The axes a plan writes down: those of more than one rank, or data if there is none."""
        found = tuple(
            MeshAxis(name, size) for name, size in zip(_AXES, self, strict=True) if size > 1
        )
        return found or (MeshAxis("data", 1),)

    def __str__(self) -> str:
        return " x ".join(
            f"{name} {size}" for name, size in zip(_AXES, self, strict=True) if size > 1
        ) or "one device"  # fmt: skip


class PositionClass(NamedTuple):
    """Positions whose ranks are alike: the slowest device, the least memory, the wiring."""

    device: Device
    memory_bytes: int
    wiring: str


@dataclass
class Site:
    """A mesh on a cluster. Everything is priced by `predict.costs`, as predictions are. The own
    executor, where that is what runs `by_program`, has no sums in memory.
    """

    subject: Subject
    cluster: Cluster
    mesh: Mesh
    calibration: Calibration | None = None
    by_program: bool = False
    _seen: dict[object, float] = field(default_factory=dict, repr=False)

    @cached_property
    def costs(self) -> Costs:
        axes = tuple(MeshAxis(name, size) for name, size in zip(_AXES, self.mesh, strict=True))
        order: Rows = ()
        provenance = self.subject.provenance(self.cluster)
        return Costs(
            Plan("search", provenance, axes, (), (), 1, "1f1b", order),
            self.cluster,
            self.calibration,
        )

    @cached_property
    def classes(self) -> tuple[PositionClass, ...]:
        """The class of each position."""
        width = self.mesh.num_ranks // self.mesh.pipeline
        found = []
        for position in range(self.mesh.pipeline):
            nodes = self.cluster.kinds(range(position * width, (position + 1) * width))
            device = self.costs.devices[position]
            memory = min(node.device.memory_bytes for node in nodes)
            found.append(PositionClass(device, memory, "+".join(sorted(n.name for n in nodes))))
        return tuple(found)

    @cached_property
    def kinds(self) -> tuple[PositionClass, ...]:
        """The distinct classes, in order of appearance."""
        return tuple(dict.fromkeys(self.classes))

    def positions(self, kind: int) -> tuple[int, ...]:
        """Return the positions of a class."""
        wanted = self.kinds[kind]
        return tuple(i for i, found in enumerate(self.classes) if found == wanted)

    def data_s(
        self,
        kind: str,
        num_bytes: int,
        position: int,
        axis: AxisName = "data",
        *,
        meet: bool = False,
    ) -> float:
        """Seconds of a collective along the data (or replica) axis at a position; in memory where
        ranks `meet` and can.
        """
        meet = meet and not self.by_program
        key = (kind, num_bytes, self.classes[position], axis, meet)
        if key not in self._seen:
            ranks = self.costs.group((axis,), position)
            call = self.costs.meet if meet else self.costs.call
            self._seen[key] = call(kind, num_bytes, ranks).seconds
        return self._seen[key]

    def meets(self, zero: How) -> bool:
        """Whether gradients are reduced in memory, after the last backward."""
        if zero not in ("replicate", "shard_optimizer") or self.by_program or not self.costs.is_cpu:
            return False
        return self.costs.meets(self.costs.group(("data",), 0))

    def send_s(self, num_bytes: int, sender: int, receiver: int) -> float:
        """Seconds of a message between two positions."""
        if not num_bytes or sender == receiver:
            return 0.0
        key = ("send", num_bytes, sender, receiver)
        if key not in self._seen:
            self._seen[key] = self.costs.send(num_bytes, sender, receiver).seconds
        return self._seen[key]

    def sum_s(self, num_bytes: int, positions: tuple[int, ...]) -> float:
        """Seconds of adding up a gradient that several positions hold."""
        ranks = [self.costs.ranks[position] for position in positions]
        return self.costs.call("all_reduce", num_bytes, ranks).seconds

    def update_s(self, num_bytes: float, position: int, offload: Offload = "none") -> float:
        """Seconds of the optimizer's step at a position, on its devices or their host."""
        where = self.classes[position]
        key = ("update", num_bytes, offload != "none", where.device.name, where.wiring)
        if key not in self._seen:
            costs = self.costs if offload == "none" else self.offloaded
            self._seen[key] = costs.update_s(num_bytes, position)
        return self._seen[key]

    def copy_s(self, way: Literal["down", "up"], num_bytes: int, position: int) -> float:
        """Seconds of a copy from a device to its host, or back."""
        return self.costs.copy(way, num_bytes, position).seconds if num_bytes else 0.0

    @cached_property
    def offloaded(self) -> Costs:
        """The same costs with the optimizer on the host."""
        plan = replace(self.costs.plan, offload="optimizer")
        return Costs(plan, self.cluster, self.calibration)


def inner_axes(cluster: Cluster, num_ranks: int, mesh: Mesh, first: int = 0) -> tuple[Axis, ...]:
    """Return the axes that split operators, as the ranks from `first` on see them."""
    found = []
    if mesh.context > 1:
        ranks = tuple(first + i * mesh.tensor for i in range(mesh.context))
        found.append(Axis("context", mesh.context, ranks, _alike(cluster, ranks, num_ranks)))
    if mesh.tensor > 1:
        ranks = tuple(range(first, first + mesh.tensor))
        found.append(Axis("tensor", mesh.tensor, ranks, _alike(cluster, ranks, num_ranks)))
    return tuple(found)


def _alike(cluster: Cluster, ranks: tuple[int, ...], num_ranks: int) -> int:
    """How many groups like `ranks` share the first one's machine (as predict.costs counts)."""
    first = cluster.place(ranks[0])
    here = sum(cluster.place(rank).node_index == first.node_index for rank in ranks)
    start = ranks[0] - first.local
    used = min(num_ranks, start + first.node.num_devices) - start
    return max(1, used // here)
