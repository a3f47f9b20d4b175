"""Dynamic axial parallelism (FastFold, arXiv 2203.00854) for the Evoformer: alignment and pairs are
split along one of their two axes at a time, the one that the next module leaves alone.

    mesh    (data d, context c)
    splits  each module along the axis it does not mix, found by following that axis from its input:
            row attention by sequences, column attention by residues, triangle updates by the row of
            the pair they make, attention around the ending node by columns
    order   one stage: F B F B ... over the microbatches

Between modules whose axes differ data goes all to all; an outer product or a triangle update
gathers the side it sums over. Weights are whole everywhere, their gradients summed.
"""

from __future__ import annotations

from collections.abc import Mapping

from toolkit.errors import InfeasibleError
from toolkit.hardware import Cluster
from toolkit.ir.dims import Annotation
from toolkit.ir.graph import Op, OpGraph
from toolkit.plan import chain, recycling
from toolkit.plan.order import simple
from toolkit.plan.plan import Axis, Placement, Plan, Split, Stage
from toolkit.plan.program import pattern, rules
from toolkit.plan.subject import Subject

# Along which axis of what it reads (1 or 2 of [batch, 1, 2, features]) a module is split; the
# others, residual sums among them, stay with what they are handed last.
_AXES: Mapping[str, int] = {
    "row_attention": 1, "column_attention": 2, "outer_product": 2, "triangle_outgoing": 1,
    "triangle_incoming": 2, "triangle_starting": 1, "triangle_ending": 2,
}  # fmt: skip


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
    (default: all) share each sample, the rest is data parallel.

    Raises InfeasibleError for a model without an alignment and pairs, or sizes that do not divide.
    """
    size = num_ranks or cluster.num_devices
    degree = context or size
    if size % degree:
        raise InfeasibleError(f"context {degree} does not divide {size} ranks")
    data = size // degree
    count = microbatches or 1
    micro = subject.graph.at(batch=subject.divided(data, count))
    blocks = recycling.blocks_by_pass(micro)[0]
    return Plan(
        strategy="dap",
        provenance=subject.provenance(cluster),
        mesh=(Axis("data", data), Axis("context", degree)),
        placements=tuple(Placement(path, "data", "replicate") for path in (*blocks, "")),
        splits=splits(micro, degree),
        stages=(Stage(None, blocks),),
        microbatches=count,
        schedule="1f1b",
        order=simple.one_f_one_b(1, count).rows,
        recompute=blocks if recompute else (),
    )


def splits(graph: OpGraph, degree: int) -> tuple[Split, ...]:
    """Return the splits of a microbatch's graph over the context axis."""
    _check(graph, degree)
    if degree == 1:
        return ()
    learned = graph.learned
    found: dict[str, str] = {}
    marked: dict[str, int] = {}  # tensor -> the dim it is split along
    for segment in chain.segments(graph):
        inside: dict[str, set[str]] = {}  # module -> what it has made in this block
        for op in segment.ops:
            if learned.isdisjoint(op.outputs):
                continue
            annotation = rules.annotation(op, graph)
            module = _module(op, segment.path)
            made = inside.setdefault(module, set())
            name = _dim(graph, op, annotation, _AXES.get(module), marked, made, degree)
            made.update(op.outputs)
            if name is not None:
                found[op.name] = name
                for tensor, spec in zip(op.outputs, annotation.outputs, strict=True):
                    marked.update((tensor, at) for at, axis in enumerate(spec) if name in axis[:1])
    return pattern.splits(graph, found, "context")


def _check(graph: OpGraph, degree: int) -> None:
    if "sequences" not in graph.sizes or "tokens" not in graph.sizes:
        raise InfeasibleError(
            f"{graph.name} has no alignment and pairs to split along their axes",
            remedy="use context parallelism for a sequence, co-shard for windows",
        )
    for what in ("sequences", "tokens"):
        if graph.sizes[what] % degree:
            raise InfeasibleError(
                f"context {degree} does not divide {graph.sizes[what]} {what}",
                remedy="use a degree that divides both",
            )


def _module(op: Op, block: str | None) -> str:
    """The module of the block (or of the model) that an operator is in."""
    path = op.module_path
    inside = path[len(block) + 1 :] if block is not None else path
    return inside.partition(".")[0]


def _dim(
    graph: OpGraph,
    op: Op,
    annotation: Annotation,
    axis: int | None,
    marked: Mapping[str, int],
    made: set[str],
    degree: int,
) -> str | None:
    """What `op` calls the dim it is split along, or None where it cannot be."""
    names = []
    for tensor, spec in zip(op.inputs, annotation.inputs, strict=True):
        known = graph.tensors[tensor]
        if axis is not None and tensor not in made:
            if known.role != "parameter" and len(known.shape) > 2:
                names.append(_leading(spec, axis))
        elif tensor in marked:
            names.append(_leading(spec, marked[tensor]))
        elif axis is None and known.role != "parameter" and len(known.shape) > 2:
            names.append(_leading(spec, 1))
    if axis is None:
        names.reverse()
    return next((name for name in names if _can(annotation, name, degree)), None)


def _leading(spec: tuple[tuple[str, ...], ...], place: int) -> str:
    axis = spec[place] if place < len(spec) else ()
    return axis[0] if axis else ""


def _can(annotation: Annotation, name: str, degree: int) -> bool:
    return annotation.kinds.get(name) == "" and annotation.sizes[name] % degree == 0
