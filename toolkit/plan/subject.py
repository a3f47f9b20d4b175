"""What is planned: a model's graph at the sizes of a global batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from toolkit.errors import InfeasibleError, UsageError, unknown_name
from toolkit.garbage import uncollected
from toolkit.hardware import Cluster
from toolkit.ir.graph import OpGraph
from toolkit.plan import chain, flops
from toolkit.plan.plan import Plan, Provenance

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Subject:
    """A model reference, its traced graph and its data type. Nothing has been built."""

    model: str
    graph: OpGraph
    dtype: str = "float32"

    @property
    def batch(self) -> int:
        return self.graph.sizes["batch"]

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        return chain.blocks(self.graph)

    @cached_property
    def model_flops(self) -> float:
        """FLOPs of a step of the whole batch."""
        return flops.model_flops(self.graph)

    def provenance(self, cluster: Cluster) -> Provenance:
        sizes = {name: size for name, size in self.graph.sizes.items() if name != "context"}
        return Provenance(self.model, sizes, self.dtype, self.graph.digest, cluster.name)

    def divided(self, num_ranks: int, num_microbatches: int) -> int:
        """Return the microbatch of one of `num_ranks` ranks; InfeasibleError if uneven."""
        pieces = num_ranks * num_microbatches
        if self.batch % pieces:
            nearest = max(pieces, round(self.batch / pieces) * pieces)
            raise InfeasibleError(
                f"batch {self.batch} does not divide into {num_ranks} ranks x {num_microbatches} "
                f"microbatches = {pieces} pieces",
                remedy=f"use batch {nearest}, or other numbers of ranks or microbatches",
            )
        return self.batch // pieces


@uncollected()
def load(model: str, *, dtype: str = "float32", **sizes: int | None) -> Subject:
    """Trace the model `model` names (see models.load) at these sizes of a global batch.

    Sizes left out (None) take the model's defaults; the batch's default is 8. Raises UsageError
    for an unknown model or size.
    """
    import torch

    from toolkit import ir, models

    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    found = models.load(model)
    wanted: dict[str, Any] = {
        **found.sizes,
        "batch": 8,
        **{k: v for k, v in sizes.items() if v is not None},
    }
    unknown = sorted(set(wanted) - set(found.sizes))
    if unknown:
        raise UsageError(
            f"{model} has no size {unknown[0]!r}", remedy=f"it has: {', '.join(found.sizes)}"
        )
    graph = ir.trace_model(found, dtype=getattr(torch, dtype), **wanted)
    return Subject(model, graph, dtype)


def read(path: Path, *, dtype: str | None = None, **sizes: int | None) -> Subject:
    """Return the subject of a graph that `toolkit trace` wrote, at these sizes of a global batch.

    Raises UsageError for a size the graph does not have, or a dtype it was not traced in.
    """
    graph = OpGraph.load(path)
    held = {tensor.dtype for tensor in graph.parameters()}
    found = dtype or (held.pop() if len(held) == 1 else "float32")
    if held - {found}:
        raise UsageError(
            f"{path} was traced in {', '.join(sorted(held))}, not in {found}",
            remedy="trace the model again with that --dtype",
        )
    if not graph.outputs or graph.tensors[graph.outputs[0]].shape:
        raise UsageError(
            f"{path} does not end in a loss: it was traced for inference",
            remedy="trace it without --inference",
        )
    wanted = {name: size for name, size in sizes.items() if size is not None}
    return Subject(graph.name, graph.at(**wanted) if wanted else graph, found)


def check_same(subject: Subject, plan: Plan) -> None:
    """Raise UsageError when the model is no longer the one the plan was made for."""
    if subject.graph.digest != plan.provenance.graph_digest:
        raise UsageError(
            f"{plan.provenance.model} traces to another graph than the one this plan was made for "
            f"({subject.graph.digest[:12]}, not {plan.provenance.graph_digest[:12]})",
            remedy="make the plan again",
        )


def of(plan: Plan) -> Subject:
    """Trace the plan's model again at the plan's sizes."""
    sizes: Mapping[str, int] = plan.provenance.sizes
    return load(plan.provenance.model, dtype=plan.provenance.dtype, **sizes)
