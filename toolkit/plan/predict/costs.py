"""The cost model applied to one plan: seconds of work and of communication, where they happen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from toolkit.cost import collective, roofline
from toolkit.cost.calibration import Calibration
from toolkit.cost.work import Work
from toolkit.errors import UsageError
from toolkit.hardware import Cluster
from toolkit.hardware.device import Device
from toolkit.ir import backward, formulas
from toolkit.ir.graph import Op, OpGraph, item_bytes
from toolkit.plan.plan import AxisName, Plan

# What takes place on one rank side by side. Collectives inside a machine and across machines use
# different wires on GPU clusters; messages between stages overtake both. Copies to the host and
# back pass each other; the host computes beside the device.
Stream = Literal["compute", "network", "fabric", "peer", "down", "up", "host"]

# AdamW reads parameter, gradient and both moments, writes all but the gradient, and does about
# 12 FLOPs an element (Loshchilov and Hutter 2019, algorithm 2).
_ADAMW_FLOPS, _ADAMW_READS, _ADAMW_WRITES = 12, 4, 3
# Between a device and its host; no traffic between ranks.
COPY = "copy"
# What a calibration calls the update, and what torch's ways of splitting add: for each Linear that
# is a DTensor and each way, for each split parameter updated, for what FSDP2 gathers and reduces.
UPDATE = "AdamW"
SPLIT_LINEAR, SPLIT_UPDATE = "DTensor linear", "DTensor AdamW"
GATHER, REDUCE = "FSDP2 gather", "FSDP2 reduce"


@dataclass(frozen=True)
class Call:
    """One communication of a rank: `num_bytes` of the full tensor, or of the message."""

    kind: str
    num_bytes: int
    seconds: float = 0.0
    stream: Stream = "network"


class Costs:
    """What things take on the ranks of `plan` in `cluster`."""

    def __init__(
        self, plan: Plan, cluster: Cluster, calibration: Calibration | None = None
    ) -> None:
        self.plan = plan
        self.cluster = cluster
        self.calibration = calibration
        self.kernels = kernels(cluster)
        self._seconds: dict[tuple[str, int, tuple[int, ...]], float] = {}
        self._places: dict[tuple[int, ...], tuple[int, Stream]] = {}

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        """The device of each position of the pipeline axis: the slowest of the ranks there, which
        the others wait for.
        """
        stride = self.plan.stride("pipeline")
        dtype = self.plan.provenance.dtype
        return tuple(
            min(
                {node.device for node in self.cluster.kinds(range(first, first + stride))},
                key=lambda device: device.peak(dtype),
            )
            for first in self.ranks
        )

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank that stands for each position of the pipeline axis."""
        return self.plan.along("pipeline")

    @property
    def is_cpu(self) -> bool:
        return self.cluster.device(0).kind == "cpu"

    def host(self, position: int) -> Device:
        """Return what the devices of a position are plugged into: a CPU is its own host.

        Raises UsageError where the machine's row names none.
        """
        node = self.cluster.place(self.ranks[position]).node
        if node.device.kind == "cpu":
            return node.device
        if node.host is None:
            raise UsageError(
                f"machine {node.name} has no host to offload to",
                remedy="name one in its row (docs/howto/add-a-device.md), or offload nothing",
            )
        return node.host

    def host_bytes(self, position: int) -> int:
        """Return a device's part of its host's memory."""
        node = self.cluster.place(self.ranks[position]).node
        return self.host(position).memory_bytes // node.num_devices

    def copy(self, way: Literal["down", "up"], num_bytes: int, position: int) -> Call:
        """Return a copy from a device to its host, or back, while all devices there do the same."""
        if self.is_cpu:
            work = Work("copy", read_bytes=num_bytes, write_bytes=num_bytes)
            return Call(COPY, num_bytes, self.seconds(work, position), "compute")
        place = self.cluster.place(self.ranks[position])
        users, _ = self._place(self.ranks[position : position + 1])
        link = place.node.host_link or place.node.link
        rate = place.node.device.host_bandwidth / (users if link.shared else 1)
        rate = min(rate, self.host(position).memory_bandwidth / users)
        return Call(COPY, num_bytes, link.latency_s + num_bytes / rate, way)

    @property
    def update_stream(self) -> Stream:
        """Where the optimizer runs."""
        return "compute" if self.plan.offload == "none" or self.is_cpu else "host"

    def seconds(self, work: Work, position: int) -> float:
        return roofline.seconds(work, self.devices[position], calibration=self.calibration)

    def forward_s(self, op: Op, graph: OpGraph, position: int) -> float:
        """Seconds of an operator's forward at a position."""
        return self._operator_s(op.kind, forward(op, graph), position)

    def backward_s(self, op: Op, graph: OpGraph, position: int) -> float:
        """Seconds of all that an operator's backward computes."""
        works = backward_works(op, graph, self.kernels)
        return self._operator_s(f"{op.kind} backward", works, position) if works else 0.0

    def _operator_s(self, name: str, works: Sequence[Work], position: int) -> float:
        seconds = sum(self.seconds(work, position) for work in works)
        if self.calibration is None:
            return seconds
        found = self.calibration.operator(name)
        return found.factor * seconds + found.overhead_s

    def group(self, axes: Sequence[AxisName], position: int) -> tuple[int, ...]:
        """Return the ranks that a rank at `position` communicates with along `axes`."""
        found = [self.ranks[position]]
        for axis in axes:
            found = [other for rank in found for other in self.plan.along(axis, rank)]
        return tuple(sorted(found))

    def call(self, kind: str, num_bytes: int, ranks: Sequence[int]) -> Call:
        """Return a communication over `ranks`, while all like groups of the plan do the same."""
        members = tuple(ranks)
        like, stream = self._place(members)
        return Call(kind, num_bytes, self._call_s(kind, num_bytes, members, like), stream)

    def meets(self, ranks: Sequence[int]) -> bool:
        """Whether ranks share the CPUs of a machine, and so reduce in memory (lower/shared.py)."""
        places = [self.cluster.place(rank) for rank in ranks]
        one = len({place.node_index for place in places}) == 1
        return one and len(places) > 1 and all(p.node.device.kind == "cpu" for p in places)

    def meet(self, kind: str, num_bytes: int, ranks: Sequence[int]) -> Call:
        """Return a collective of ranks that `meet` where they can: every rank reads its n-th of all
        buffers, and writes it to all for an all-reduce; a gather reads the other n-ths. Two
        barriers go around it, and nothing runs beside it.
        """
        if not num_bytes or not self.meets(ranks):
            return self.call(kind, num_bytes, ranks)
        num = len(ranks)
        others = num_bytes * (num - 1) / num
        read = others if kind == "all_gather" else num_bytes
        written = {"all_reduce": num_bytes, "all_gather": others}.get(kind, num_bytes / num)
        place = self.cluster.place(ranks[0])
        work = Work("copy", read_bytes=read, write_bytes=written)
        seconds = roofline.seconds(work, place.node.device, calibration=self.calibration)
        barriers_s = 2 * math.ceil(math.log2(num)) * place.node.link.latency_s
        return Call(kind, num_bytes, seconds + barriers_s, "compute")

    def send(self, num_bytes: int, sender: int, receiver: int) -> Call:
        """Return a message between two positions, while all ranks there send theirs."""
        ranks = (self.ranks[sender], self.ranks[receiver])
        like = min(self._place(ranks[:1])[0], self.plan.stride("pipeline"))
        return Call("send", num_bytes, self._call_s("send", num_bytes, ranks, like), "peer")

    def _call_s(self, kind: str, num_bytes: int, ranks: tuple[int, ...], like: int) -> float:
        if not num_bytes or len(ranks) == 1:
            return 0.0
        key = (kind, num_bytes, ranks)
        if key not in self._seconds:
            found = collective.cost(kind, num_bytes, ranks, self.cluster, concurrent=like)
            self._seconds[key] = found.seconds
        return self._seconds[key]

    def _place(self, ranks: tuple[int, ...]) -> tuple[int, Stream]:
        """How many groups like `ranks` share the first one's machine, and which wires they use."""
        if ranks not in self._places:
            places = [self.cluster.place(rank) for rank in ranks]
            first = places[0]
            here = sum(place.node_index == first.node_index for place in places)
            start = ranks[0] - first.local
            used = min(self.plan.num_ranks, start + first.node.num_devices) - start
            inside = self.is_cpu or here == len(places)
            self._places[ranks] = (max(1, used // here), "network" if inside else "fabric")
        return self._places[ranks]

    def added_s(self, name: str, num_bytes: float = 0.0) -> float:
        """Seconds that a runtime adds, where a calibration has measured them."""
        if self.calibration is None:
            return 0.0
        found = self.calibration.operator(name)
        return found.overhead_s + found.per_byte_s * num_bytes

    def slower(self, call: Call, name: str) -> Call:
        """Return `call` with what a runtime adds to it."""
        return replace(call, seconds=call.seconds + self.added_s(name, call.num_bytes))

    def update_s(self, parameter_bytes: float, position: int, *, num_split: int = 0) -> float:
        """Seconds of the AdamW update of that many bytes of parameters, `num_split` of which are
        DTensors. On a host, all devices there wait for theirs.
        """
        if not parameter_bytes:
            return 0.0
        if self.update_stream == "host":
            users, _ = self._place(self.ranks[position : position + 1])
            work = update(users * parameter_bytes, self.plan.provenance.dtype)
            return roofline.seconds(work, self.host(position))
        work = update(parameter_bytes, self.plan.provenance.dtype)
        seconds = self._operator_s(UPDATE, (work,), position)
        return seconds + num_split * self.added_s(SPLIT_UPDATE)


def kernels(cluster: Cluster) -> backward.Kernels:
    """Return whose kernels run: they decide what backward keeps and computes again."""
    return "cpu" if cluster.device(0).kind == "cpu" else "cuda"


def forward(op: Op, graph: OpGraph) -> tuple[Work, ...]:
    """Return what is done in an operator's forward."""
    return (done(op, graph, formulas.work(op, graph)),)


def backward_works(op: Op, graph: OpGraph, kernels: backward.Kernels) -> tuple[Work, ...]:
    """Return what is done in an operator's backward."""
    return tuple(done(op, graph, work) for work in backward.work(op, graph, kernels=kernels))


def update(parameter_bytes: float, dtype: str) -> Work:
    """Return the AdamW update of that many bytes of parameters."""
    return Work(
        "elementwise",
        flops=_ADAMW_FLOPS * parameter_bytes / item_bytes(dtype),
        read_bytes=_ADAMW_READS * parameter_bytes,
        write_bytes=_ADAMW_WRITES * parameter_bytes,
        dtype=dtype,
    )


def done(op: Op, graph: OpGraph, work: Work) -> Work:
    """What is done of the work counted: fused kernels skip what a causal mask hides, half of all
    pairs of positions.
    """
    if op.kind != formulas.ATTENTION or work.op_class != "attention":
        return work
    return replace(work, flops=work.flops / 2) if op.arguments["is_causal"] else work
