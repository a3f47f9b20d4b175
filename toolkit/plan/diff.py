"""What two plans have in common and where they differ, by module path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.plan.plan import Plan


@dataclass(frozen=True)
class Change:
    """One thing that differs; a side where it is absent is None."""

    what: str
    first: Any
    second: Any


def diff(first: Plan, second: Plan) -> tuple[Change, ...]:
    """Return what differs between two plans, in the order a plan is written; empty if nothing.

    Predictions are compared by their step, peak memory and traffic; where a plan came from
    (strategy, what else was considered) is not compared.
    """
    one, other = _facts(first), _facts(second)
    return tuple(
        Change(what, one.get(what), other.get(what))
        for what in dict.fromkeys((*one, *other))
        if one.get(what) != other.get(what)
    )


def _facts(plan: Plan) -> Mapping[str, Any]:
    came = plan.provenance
    facts: dict[str, Any] = {
        "model": came.model,
        "dtype": came.dtype,
        "cluster": came.cluster,
        "graph": came.graph_digest[:12],
        **{f"size {name}": size for name, size in came.sizes.items()},
        **{f"axis {axis.name}": axis.size for axis in plan.mesh},
        "microbatches": plan.microbatches,
        "schedule": plan.schedule,
        "seed": plan.seed,
    }
    for index, stage in enumerate(plan.stages):
        where = ", ".join(map(str, stage.devices))
        grad = ", no gradient" if stage.no_grad else ""
        blocks = f"{stage.blocks[0]} to {stage.blocks[-1]}" if stage.blocks else "no block"
        facts[f"stage {index}"] = f"{blocks} on position {where}{grad}"
    for entry in plan.placements:
        facts[f"{entry.module or '(root)'} over {entry.axis}"] = entry.how
    for split in plan.splits:
        over = f"over {split.axis}" if split.axis else "on one device"
        facts[f"{split.ops} {over}"] = f"{split.dim}" + (f" in {split.parts}" * bool(split.parts))
    for path in plan.recompute:
        facts[f"{path} in backward"] = "run again"
    if plan.offload != "none":
        facts["on the host"] = plan.offload
    for position, row in enumerate(plan.order):
        facts[f"order of position {position}"] = " ".join(map(str, row))
    if plan.prediction is not None:
        facts["predicted step_s"] = plan.prediction.step_s
        facts["predicted peak_bytes"] = plan.prediction.peak_bytes
        if plan.prediction.host_bytes:
            facts["predicted host_bytes"] = plan.prediction.host_peak_bytes
        facts["predicted bubble"] = plan.prediction.bubble
        for entry_ in plan.prediction.traffic:
            key = f"predicted {entry_.kind} of position {entry_.position}"
            facts[key] = f"{entry_.count} calls, {entry_.num_bytes} bytes"
    return facts
