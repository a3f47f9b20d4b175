"""What each rank of a plan holds at its fullest moment, as ledgers of the cost model."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.cost.memory import Ledger
from toolkit.hardware import Cluster
from toolkit.ir import backward
from toolkit.ir.graph import OpGraph, Tensor
from toolkit.plan import chain, costs, traffic
from toolkit.plan.order.action import Action
from toolkit.plan.plan import Plan

# PyTorch's AdamW keeps two moments in the parameter's own type.
_MOMENTS = 2


def ledgers(plan: Plan, local: OpGraph, cluster: Cluster) -> tuple[Ledger, ...]:
    """Return one ledger per stage. `local` is the graph of one rank's shapes and microbatch."""
    saved: dict[str, int] = {}  # operator -> bytes that it is the first to keep
    for kept in backward.saved(local, kernels=costs.kernels(cluster)):
        saved[kept.ops[0]] = saved.get(kept.ops[0], 0) + kept.num_bytes
    begins = [stage.begins_at for stage in plan.stages]
    stages = chain.stage_segments(local, begins)
    held = traffic.stage_parameters(plan, local)
    return tuple(
        _ledger(plan, local, stage, stages[stage], held[stage], saved)
        for stage in range(len(plan.stages))
    )


def _ledger(
    plan: Plan,
    local: OpGraph,
    stage: int,
    segments: tuple[chain.Segment, ...],
    parameters: tuple[Tensor, ...],
    saved: dict[str, int],
) -> Ledger:
    size = plan.size("data")
    sharded = bool(plan.placed("shard"))
    held = sum(
        traffic.padded_bytes(tensor, size) // size if sharded else tensor.num_bytes
        for tensor in parameters
    )
    alive = _alive(plan.order[stage])
    ledger = (
        Ledger()
        .add("parameters", "parameters", held)
        .add("gradients", "gradients", held)
        .add("AdamW moments", "optimizer", _MOMENTS * held)
    )
    for name, num_bytes, per_microbatch in _activations(plan, local, segments, saved):
        ledger = ledger.add(name, "activations", num_bytes * (alive if per_microbatch else 1))
    for segment in segments:
        largest = max(
            (local.tensors[name].num_bytes for op in segment.ops for name in op.outputs), default=0
        )
        ledger = ledger.add(f"largest result of {segment.path or 'the rest'}", "temporary", largest)
    return _communication(plan, local, stage, ledger)


def _activations(
    plan: Plan, local: OpGraph, segments: tuple[chain.Segment, ...], saved: dict[str, int]
) -> list[tuple[str, int, bool]]:
    """(name, bytes of one microbatch, whether every microbatch alive holds them)."""
    entries: list[tuple[str, int, bool]] = []
    again = 0
    for segment in segments:
        own = sum(saved.get(op.name, 0) for op in segment.ops)
        recomputed = segment.path in plan.recompute or (
            bool(plan.recompute) and len(plan.stages) > 1
        )
        if recomputed:
            again = max(again, own) if len(plan.stages) == 1 else again + own
            own = _entering(local, segment)
        entries.append((f"saved by {segment.path or 'the rest'}", own, True))
    if again:
        entries.append(("recomputed", again, False))
    return entries


def _entering(local: OpGraph, segment: chain.Segment) -> int:
    """Bytes of the activations a segment reads from outside: what recomputation keeps."""
    made = {name for op in segment.ops for name in op.outputs}
    read = {name for op in segment.ops for name in op.inputs} - made
    tensors = (local.tensors[name] for name in read)
    return sum(tensor.num_bytes for tensor in tensors if tensor.role in ("activation", "input"))


def _communication(plan: Plan, local: OpGraph, stage: int, ledger: Ledger) -> Ledger:
    if plan.placed("shard"):
        units = traffic.unit_bytes(local, plan)
        root = units.pop("", 0)
        # The root stays gathered; of the blocks one computes while the next is gathered, and
        # whole gradients of one wait for their reduce-scatter.
        ledger = ledger.add("gathered root", "communication", root)
        ledger = ledger.add("gathered blocks", "communication", sum(sorted(units.values())[-2:]))
        return ledger.add("whole gradients", "communication", max([root, *units.values()]))
    # torch's PipelineStage allocates a buffer for every microbatch it will receive.
    for border in (stage, stage + 1):
        if 0 < border < len(plan.stages):
            begins = plan.stages[border].begins_at
            assert begins is not None
            size = sum(tensor.num_bytes for tensor in chain.crossing(local, begins))
            ledger = ledger.add("received", "communication", size * plan.microbatches)
    return ledger


def _alive(row: Sequence[Action]) -> int:
    """The most microbatches whose activations a row of one stage holds at once."""
    held = peak = 0
    for action in row:
        held += {"F": 1, "B": -1}.get(action.kind, 0)
        peak = max(peak, held)
    return peak
