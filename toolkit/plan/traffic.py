"""What a plan communicates in one step, exactly: kinds, counts and bytes.

Equations, for m microbatches and n ranks (checked against a count of what is really called):
- data parallel: one all-reduce per unit with trained parameters.
- FSDP2 (Zhao et al. 2023, PyTorch FSDP): 2m all-gathers per block (forward, and again in
  backward) and m for the root, which stays gathered between the two; one reduce-scatter per unit.
  Each parameter is padded along dim 0 to a multiple of n.
- tensor parallel (Shoeybi et al. 2019, section 3): m times one all-reduce forward per split
  region's output, and one backward per region's input, if that input needs a gradient.
- pipeline: m sends per border and direction, and an all-reduce per parameter held by two stages.
"""

from __future__ import annotations

from collections.abc import Iterator

from toolkit.ir.graph import OpGraph, Tensor
from toolkit.plan import chain
from toolkit.plan.plan import Plan, Traffic
from toolkit.plan.transform import Region


def unit_bytes(graph: OpGraph, plan: Plan) -> dict[str, int]:
    """Return bytes of parameters by unit: whole when replicated (and trained), padded when
    sharded.
    """
    sharded = plan.placed("shard")
    units = chain.parameters(graph, sharded or plan.placed("replicate"))
    return {
        unit: sum(
            padded_bytes(tensor, plan.size("data")) if sharded else tensor.num_bytes
            for tensor in tensors
            if sharded or tensor.requires_grad
        )
        for unit, tensors in units.items()
    }


def scattered_bytes(graph: OpGraph, plan: Plan) -> dict[str, int]:
    """Return bytes of gradients by unit that FSDP2 reduces: of parameters a gradient reaches."""
    return {
        unit: sum(
            padded_bytes(tensor, plan.size("data"))
            for tensor in tensors
            if tensor.requires_grad
            and any(op.name in graph.differentiated for op in graph.consumers[tensor.name])
        )
        for unit, tensors in chain.parameters(graph, plan.placed("shard")).items()
    }


def padded_bytes(tensor: Tensor, num_ranks: int) -> int:
    """Bytes of a parameter whose dim 0 is padded to a multiple of `num_ranks`."""
    if not tensor.shape:
        return tensor.num_bytes * num_ranks
    rows = -(-tensor.shape[0] // num_ranks) * num_ranks
    return tensor.num_bytes // max(tensor.shape[0], 1) * rows


def predict(plan: Plan, graph: OpGraph, regions: tuple[Region, ...]) -> tuple[Traffic, ...]:
    """Return the traffic of one rank of each stage.

    `graph` is the model at one rank's microbatch, whole; `regions` are its tensor-split ones.
    """
    calls: dict[tuple[int, str], list[int]] = {}
    for stage, kind, num_bytes in _calls(plan, graph, regions):
        calls.setdefault((stage, kind), []).append(num_bytes)
    return tuple(
        Traffic(stage, kind, len(sizes), sum(sizes))
        for (stage, kind), sizes in sorted(calls.items())
    )


def _calls(
    plan: Plan, graph: OpGraph, regions: tuple[Region, ...]
) -> Iterator[tuple[int, str, int]]:
    m = plan.microbatches
    sharded = bool(plan.placed("shard"))
    scattered = scattered_bytes(graph, plan)
    for unit, num_bytes in unit_bytes(graph, plan).items():
        if num_bytes and sharded:
            for _ in range(2 * m if unit else m):
                yield 0, "all_gather", num_bytes
            if scattered[unit]:
                yield 0, "reduce_scatter", scattered[unit]
        elif num_bytes:
            yield 0, "all_reduce", num_bytes
    for region in regions:
        repeats = 2 if plan.recompute and region.repeated else 1
        for _ in range(m):
            for _ in range(repeats):
                yield 0, "all_reduce", graph.tensors[region.output].num_bytes
            if graph.tensors[region.input].requires_grad:
                yield 0, "all_reduce", graph.tensors[region.input].num_bytes
    yield from _pipeline_calls(plan, graph)


def _pipeline_calls(plan: Plan, graph: OpGraph) -> Iterator[tuple[int, str, int]]:
    for stage, begins in enumerate(plan.stages[1:], start=1):
        assert begins.begins_at is not None
        for tensor in chain.crossing(graph, begins.begins_at):
            for _ in range(plan.microbatches):
                yield stage - 1, "send", tensor.num_bytes
                yield stage, "recv", tensor.num_bytes
                if tensor.requires_grad:
                    yield stage, "send", tensor.num_bytes
                    yield stage - 1, "recv", tensor.num_bytes
    for tensor, holders in shared_parameters(plan, graph):
        for stage in holders:
            yield stage, "all_reduce", tensor.num_bytes


def stage_parameters(plan: Plan, graph: OpGraph) -> tuple[tuple[Tensor, ...], ...]:
    """Return the parameters each stage holds; one that two stages read is held by both."""
    begins = [stage.begins_at for stage in plan.stages]
    found = []
    for segments in chain.stage_segments(graph, begins):
        names = {name for segment in segments for op in segment.ops for name in op.inputs}
        found.append(tuple(tensor for tensor in graph.parameters() if tensor.name in names))
    return tuple(found)


def shared_parameters(plan: Plan, graph: OpGraph) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Yield the parameters that several stages hold (a tied embedding), with those stages."""
    held = stage_parameters(plan, graph)
    for tensor in graph.parameters():
        holders = tuple(stage for stage, tensors in enumerate(held) if tensor in tensors)
        if len(holders) > 1:
            yield tensor, holders
