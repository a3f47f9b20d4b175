"""Context parallel: every sequence is split by tokens; attention gathers keys and values.

    mesh    (data d, context c)
    splits  tokens of every operator that can be split along them, attention's queries included
    order   one stage: F B F B ... over the microbatches

Keys and values are gathered before attention, and their gradients scattered after it. The head and
the loss need rows of whole samples: with one sample a microbatch they stay split by tokens, else
the batch is split there. With a causal mask the last rank attends to the most.
"""

from __future__ import annotations

from toolkit.errors import InfeasibleError, UsageError
from toolkit.hardware import Cluster
from toolkit.ir.dims import Annotation
from toolkit.ir.graph import Op, OpGraph
from toolkit.plan import chain
from toolkit.plan.order import simple
from toolkit.plan.plan import Axis, Placement, Plan, Split, Stage
from toolkit.plan.program import pattern, rules, select
from toolkit.plan.subject import Subject


def plan(
    subject: Subject,
    cluster: Cluster,
    *,
    num_ranks: int | None = None,
    microbatches: int | None = None,
    recompute: bool = False,
    context: int | None = None,
) -> Plan:
    """Return the plan over `num_ranks` ranks (default: the whole cluster): `context` of them
    (default: all) share each sequence, the rest is data parallel.

    Raises InfeasibleError when the model has no tokens, or their number does not divide.
    """
    size = num_ranks or cluster.num_devices
    degree = context or size
    if size % degree:
        raise InfeasibleError(f"context {degree} does not divide {size} ranks")
    data = size // degree
    count = microbatches or 1
    micro = subject.graph.at(batch=subject.divided(data, count))
    return Plan(
        strategy="context",
        provenance=subject.provenance(cluster),
        mesh=(Axis("data", data), Axis("context", degree)),
        placements=tuple(Placement(path, "data", "replicate") for path in (*subject.blocks, "")),
        splits=splits(micro, degree),
        stages=(Stage(None, subject.blocks),),
        microbatches=count,
        schedule="1f1b",
        order=simple.one_f_one_b(1, count).rows,
        recompute=subject.blocks if recompute else (),
    )


def splits(graph: OpGraph, degree: int) -> tuple[Split, ...]:
    """Return the splits of a microbatch's graph by tokens over the context axis."""
    if degree == 1:
        return ()
    tokens = graph.sizes.get("tokens")
    if tokens is None:
        raise InfeasibleError(
            f"{graph.name} has no tokens to split over a context axis",
            remedy="use data or tensor parallelism",
        )
    if tokens % degree:
        raise InfeasibleError(
            f"context {degree} does not divide {tokens} tokens",
            remedy="use a degree that does",
        )

    def annotate(op: Op) -> Annotation:
        return rules.annotation(op, graph)

    starts = [name for name in graph.inputs if graph.tensors[name].shape[1:2] == (tokens,)]
    dims = select.flow(graph, annotate, starts, 1)
    # What is made of no parameter is small, and made whole on every rank.
    learned = graph.learned
    dims = {name: dim for name, dim in dims.items() if learned.intersection(graph.op(name).outputs)}
    batch = graph.sizes["batch"]
    if batch > 1:
        rows = _after_blocks(graph)
        if batch % degree:
            raise InfeasibleError(
                f"the head and the loss are split by samples, and {degree} does not divide the "
                f"{batch} of a microbatch",
                remedy=f"use microbatches of 1 or of a multiple of {degree} samples",
            )
        samples = select.flow(graph, annotate, graph.inputs, 0)
        samples = {
            name: dim
            for name, dim in samples.items()
            if learned.intersection(graph.op(name).outputs)
        }
        dims = {name: dim for name, dim in dims.items() if name not in rows}
        dims.update({name: dim for name, dim in samples.items() if name in rows})
    try:
        return pattern.splits(graph, _divisible(graph, dims, degree), "context")
    except UsageError as error:
        raise InfeasibleError(str(error)) from error


def _after_blocks(graph: OpGraph) -> frozenset[str]:
    """The operators after the last block."""
    segments = chain.segments(graph)
    last = max(index for index, one in enumerate(segments) if one.path is not None)
    return frozenset(op.name for one in segments[last + 1 :] for op in one.ops)


def _divisible(graph: OpGraph, dims: dict[str, str], degree: int) -> dict[str, str]:
    """Of these, the dims that have a multiple of `degree` elements."""
    return {
        name: dim
        for name, dim in dims.items()
        if rules.annotation(graph.op(name), graph).sizes[dim] % degree == 0
    }
