"""What each piece of a plan takes on its device: seconds, by segment, of one microbatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.cost import collective, roofline
from toolkit.cost.calibration import Calibration
from toolkit.cost.work import Work
from toolkit.hardware import Cluster
from toolkit.ir import backward, formulas
from toolkit.ir.graph import Op, OpGraph, item_bytes
from toolkit.plan import chain
from toolkit.plan.plan import Plan
from toolkit.plan.transform import Region

# AdamW reads parameter, gradient and both moments, writes all but the gradient, and does about
# 12 FLOPs an element (Loshchilov and Hutter 2019, algorithm 2).
_ADAMW_FLOPS, _ADAMW_READS, _ADAMW_WRITES = 12, 4, 3


@dataclass(frozen=True)
class Step:
    """Computing for `seconds`, then an all-reduce of `reduce_s` that the next step waits for."""

    seconds: float
    reduce_s: float = 0.0


@dataclass(frozen=True)
class Piece:
    """One segment on one rank, for one microbatch."""

    path: str | None
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]

    @property
    def forward_s(self) -> float:
        return sum(step.seconds for step in self.forward)

    @property
    def backward_s(self) -> float:
        return sum(step.seconds for step in self.backward)


class Costs:
    """The cost model applied to one plan: `local` is the graph of one rank's shapes."""

    def __init__(
        self,
        plan: Plan,
        local: OpGraph,
        regions: tuple[Region, ...],
        cluster: Cluster,
        calibration: Calibration | None = None,
    ) -> None:
        self.plan = plan
        self.local = local
        self.cluster = cluster
        self.calibration = calibration
        self.ranks = range(plan.num_ranks)
        self.kernels = kernels(cluster)
        self._reduced_after = {local.producer[region.output].name: region for region in regions}
        self._reduced_before = {region.columns_op: region for region in regions}

    def seconds(self, work: Work, rank: int) -> float:
        return roofline.seconds(work, self.cluster.device(rank), calibration=self.calibration)

    def collective_s(
        self, kind: str, num_bytes: float, ranks: Sequence[int] | None = None
    ) -> float:
        """Seconds of a collective over `ranks` (default: all of the plan); 0 for no bytes."""
        if not num_bytes:
            return 0.0
        return collective.cost(kind, num_bytes, ranks or self.ranks, self.cluster).seconds

    def send_s(self, num_bytes: float, sender: int, receiver: int) -> float:
        if not num_bytes:
            return 0.0
        return collective.cost("send", num_bytes, (sender, receiver), self.cluster).seconds

    def pieces(self, rank: int, segments: tuple[chain.Segment, ...]) -> tuple[Piece, ...]:
        """Return the segments as they run on `rank`."""
        return tuple(self._piece(rank, segment) for segment in segments)

    def _piece(self, rank: int, segment: chain.Segment) -> Piece:
        forward: list[Step] = []
        running_s = 0.0
        for op in segment.ops:
            running_s += self.seconds(formulas.work(op, self.local), rank)
            region = self._reduced_after.get(op.name)
            if region:
                forward.append(Step(running_s, self._reduce_s(region.output)))
                running_s = 0.0
        forward.append(Step(running_s))
        whole_stage = bool(self.plan.recompute) and len(self.plan.stages) > 1
        recompute = whole_stage or segment.path in self.plan.recompute
        again = self._again(forward) if recompute else []
        return Piece(segment.path, tuple(forward), (*again, *self._backward(rank, segment.ops)))

    def _again(self, forward: list[Step]) -> list[Step]:
        """Forward once more, up to the last operator whose result is needed: the last reduction
        is not repeated (see traffic.py).
        """
        *head, last = forward
        if head:
            head[-1] = Step(head[-1].seconds)
        return [*head, last]

    def _backward(self, rank: int, ops: tuple[Op, ...]) -> list[Step]:
        steps: list[Step] = []
        running_s = 0.0
        for op in reversed(ops):
            for work in backward.work(op, self.local, kernels=self.kernels):
                running_s += self.seconds(work, rank)
            region = self._reduced_before.get(op.name)
            if region and self.local.tensors[region.input].requires_grad:
                steps.append(Step(running_s, self._reduce_s(region.input)))
                running_s = 0.0
        return [*steps, Step(running_s)]

    def _reduce_s(self, tensor: str) -> float:
        return self.collective_s("all_reduce", self.local.tensors[tensor].num_bytes)

    def update_s(self, parameter_bytes: float, rank: int) -> float:
        """Seconds of the AdamW update of that many bytes of parameters."""
        item = item_bytes(self.plan.provenance.dtype)
        work = Work(
            "elementwise",
            flops=_ADAMW_FLOPS * parameter_bytes / item,
            read_bytes=_ADAMW_READS * parameter_bytes,
            write_bytes=_ADAMW_WRITES * parameter_bytes,
            dtype=self.plan.provenance.dtype,
        )
        return self.seconds(work, rank)


def kernels(cluster: Cluster) -> backward.Kernels:
    """Return whose kernels run: they decide what backward keeps and computes again."""
    return "cpu" if cluster.device(0).kind == "cpu" else "cuda"


def model_flops(graph: OpGraph) -> float:
    """Return forward and backward FLOPs of the matrix operators of the whole batch (MFU counts
    neither recomputation nor element-wise work; PaLM, arXiv 2204.02311, appendix B).
    """
    counted = ("matmul", "attention", "conv")
    works = [
        work for op in graph.ops for work in (formulas.work(op, graph), *backward.work(op, graph))
    ]
    return sum(work.flops for work in works if work.op_class in counted)
