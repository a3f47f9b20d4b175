"""FLOPs that a model's training step needs, however it is divided: what MFU is counted from."""

from __future__ import annotations

from dataclasses import replace

from toolkit.cost.work import Work
from toolkit.ir import backward, formulas
from toolkit.ir.graph import Op, OpGraph
from toolkit.plan import chain


def model_flops(graph: OpGraph) -> float:
    """Return forward and backward FLOPs of the matrix operators of the whole batch (MFU counts
    neither recomputation nor element-wise work; PaLM, arXiv 2204.02311, appendix B).
    """
    counted = ("matmul", "attention", "conv")
    found = 0.0
    alike: dict[str, float] = {}
    for segment in chain.segments(graph):
        flops = alike.get(segment.structure)
        if flops is None:
            flops = sum(
                work.flops
                for op in segment.ops
                for work in (formulas.work(op, graph), *_backward_once(op, graph))
                if work.op_class in counted
            )
        if segment.structure:
            alike[segment.structure] = flops
        found += flops
    return found


def _backward_once(op: Op, graph: OpGraph) -> tuple[Work, ...]:
    """Backward work without what a fused kernel computes again: attention's is twice forward's."""
    works = backward.work(op, graph)
    if op.kind != formulas.ATTENTION or not works:
        return works
    return (replace(works[0], flops=2 * formulas.work(op, graph).flops), *works[1:])
