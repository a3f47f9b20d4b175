"""From a candidate to its plan: what the search decided, written by module and operator path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from toolkit.hardware import Cluster
from toolkit.ir.graph import OpGraph
from toolkit.plan import recycling
from toolkit.plan.order import families
from toolkit.plan.plan import AxisName, Placement, Plan, Prediction, Split, Stage
from toolkit.plan.search.frontier import Candidate
from toolkit.plan.search.stack import Outline
from toolkit.plan.subject import Subject

STRATEGY = "search"


def plan(
    candidate: Candidate,
    outline: Outline,
    subject: Subject,
    cluster: Cluster,
    inner: Sequence[Placement] | None = None,
) -> Plan:
    """Return the plan of a candidate, without a prediction. `inner` places modules over the inner
    axes where that says all; else operators are named.
    """
    order = families.build(candidate.schedule, candidate.mesh.pipeline, candidate.microbatches)
    devices = [places[0] for places in order.placement]
    moved = dict(zip(devices[-len(candidate.positions) :], candidate.positions, strict=True))
    rows = {moved[place]: row for place, row in enumerate(order.rows)}
    return Plan(
        strategy=STRATEGY,
        provenance=subject.provenance(cluster),
        mesh=candidate.mesh.axes,
        placements=(*(inner or ()), *_data(candidate, outline)),
        stages=_stages(candidate, outline),
        microbatches=candidate.microbatches,
        schedule=candidate.schedule,
        order=tuple(rows[place] for place in sorted(rows)),
        splits=() if inner is not None else tuple(_splits(candidate, outline)),
        recompute=_recomputed(candidate, outline),
        offload=candidate.offload,
    )


def estimated(made: Plan, candidate: Candidate, subject: Subject, cluster: Cluster) -> Plan:
    """Return the plan with the search's own estimate as its prediction; traffic is left out."""
    flops = subject.model_flops
    ranks = range(made.num_ranks)
    peak = sum(cluster.device(rank).peak(subject.dtype) for rank in ranks)
    found = candidate.estimate
    return replace(
        made,
        prediction=Prediction(
            step_s=found.step_s,
            model_flops=flops,
            mfu=flops / (found.step_s * peak),
            bubble=found.bubble,
            memory_bytes=found.memory,
            memory_limit_bytes=min(cluster.device(rank).memory_bytes for rank in ranks),
            traffic=(),
            host_bytes=found.host,
            host_limit_bytes=found.host_limit,
        ),
    )


def _data(candidate: Candidate, outline: Outline) -> Iterator[Placement]:
    if candidate.mesh.data > 1:
        for path in (*outline.blocks, ""):
            yield Placement(path, "data", candidate.parameters)


def _stages(candidate: Candidate, outline: Outline) -> tuple[Stage, ...]:
    found = []
    for number, stretch in enumerate(candidate.stretches):
        items = outline.items[stretch.begin : stretch.end]
        paths = tuple(item.path for item in items if item.path is not None)
        begins_at = items[0].path if number else None
        found.append(Stage(begins_at, paths, (candidate.positions[number],)))
    if len(found) == 1 or outline.num_passes == 1:
        return tuple(found)
    entries = recycling.entries(candidate.stack.graph, outline.blocks)
    *early, last = ((replace(found[0], begins_at=entry), *found[1:]) for entry in entries)
    return (*(replace(one, no_grad=True) for stages in early for one in stages), *last)


def _recomputed(candidate: Candidate, outline: Outline) -> tuple[str, ...]:
    paths = []
    for stretch in candidate.stretches:
        for item in outline.items[stretch.begin : stretch.again]:
            if item.path is not None:
                paths.append(item.path)
    return tuple(paths)


def _splits(candidate: Candidate, outline: Outline) -> Iterator[Split]:
    """Yield a split for every operator and axis, one for all copies of a block where it can be.

    The identifiers are those of the operator's annotation in the graph of one microbatch.
    """
    axes: list[AxisName] = [axis.name for axis in candidate.stack.axes]
    graph = candidate.stack.graph
    for kind, chosen in candidate.layouts.chosen.items():
        index = outline.representatives[kind]
        for name, dims in chosen.dims.items():
            for axis, dim in zip(axes, dims, strict=True):
                if dim is not None:
                    for pattern in _patterns(name, index, outline, graph):
                        yield Split(pattern, dim, axis)


def _patterns(name: str, index: int, outline: Outline, graph: OpGraph) -> Iterator[str]:
    """Yield what names an operator in all copies of its block: one pattern, unless blocks of
    another kind would match too.
    """
    item = outline.segments[index]
    if item.path is None:
        yield name
        return
    parent = item.path.rpartition(".")[0]
    siblings = outline.siblings(item)
    inside = name.removeprefix(item.path)
    if all(one.kind == item.kind for one in siblings):
        yield f"{parent}.*{inside}"
        return
    place = [op.name for op in graph.ops[item.begin : item.end]].index(name)
    for one in siblings:
        if one.kind == item.kind:
            yield graph.ops[one.begin + place].name
