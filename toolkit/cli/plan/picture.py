"""A plan as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.cli import view
from toolkit.units import format_bytes, format_count, format_flops, format_seconds

if TYPE_CHECKING:
    from toolkit.plan.plan import Plan

_SHOWN = 4
_OFFLOADED = {
    "none": "nothing",
    "optimizer": "the optimizer's states and update",
    "parameters": "parameters, gradients, the optimizer's states and update",
}


def summary(plan: Plan) -> list[Any]:
    """Return what the plan says, and what is predicted of it."""
    prediction = plan.prediction
    came = plan.provenance
    mesh = " x ".join(f"{axis.name} {axis.size}" for axis in plan.mesh)
    rows = [
        ["model", f"{came.model}, {came.dtype}"],
        ["sizes", ", ".join(f"{name} {size:,}" for name, size in came.sizes.items())],
        ["mesh", f"{mesh} on {came.cluster}"],
        ["microbatches", f"{plan.microbatches} of {plan.microbatch}"],
        ["placements", _placements(plan)],
        ["splits", _splits(plan)],
        ["stages", _stages(plan)],
        ["recompute", f"{len(plan.recompute)} blocks" if plan.recompute else "nothing"],
        ["on the host", _OFFLOADED[plan.offload]],
    ]
    shown: list[Any] = [view.table(f"Plan: {plan.strategy}", ["what", "value"], rows)]
    if prediction is None:
        return shown
    numbers = [
        ["step time", format_seconds(prediction.step_s)],
        ["model FLOPs a step", format_flops(prediction.model_flops)],
        ["MFU", f"{prediction.mfu:.1%}"],
        ["bubble", f"{prediction.bubble:.1%}"],
        [
            "memory of the fullest rank",
            f"{format_bytes(prediction.peak_bytes)} of "
            f"{format_bytes(prediction.memory_limit_bytes)}",
        ],
    ]
    if prediction.host_bytes:
        numbers.append(
            [
                "memory of its host, a device's part",
                f"{format_bytes(prediction.host_peak_bytes)} of "
                f"{format_bytes(prediction.host_limit_bytes)}",
            ]
        )
    totals = [sum(entries.values()) for entries in prediction.memory_bytes]
    fullest = totals.index(max(totals))
    memory = [[name, format_bytes(size)] for name, size in prediction.memory_bytes[fullest].items()]
    traffic = [
        [row.position, row.kind, format_count(row.count), format_bytes(row.num_bytes)]
        for row in prediction.traffic
    ]
    return [
        *shown,
        view.table("Predicted, one step", ["what", "predicted>"], numbers),
        view.table(
            f"Predicted memory of the fullest rank (position {fullest})",
            ["category", "predicted>"],
            memory,
        ),
        view.table(
            "Predicted traffic of a rank", ["position>", "kind", "calls>", "bytes>"], traffic
        ),
    ]


def _placements(plan: Plan) -> str:
    counts: dict[str, list[str]] = {}
    for entry in plan.placements:
        counts.setdefault(entry.how, []).append(entry.module or "(root)")
    return (
        "; ".join(
            f"{how}: {', '.join(paths[:4])}" + (f" and {len(paths) - 4} more" * (len(paths) > 4))
            for how, paths in counts.items()
        )
        or "none"
    )


def _stages(plan: Plan) -> str:
    shown = []
    for index, stage in enumerate(plan.stages):
        blocks = f"{stage.blocks[0]} to {stage.blocks[-1]}" if stage.blocks else "no block"
        at = ", ".join(map(str, stage.devices))
        where = f" on {at}" if plan.size("pipeline") > 1 else ""
        shown.append(f"{index}: {blocks}{where}{' without gradient' * stage.no_grad}")
    return "; ".join(shown)


def _splits(plan: Plan) -> str:
    counts: dict[str, int] = {}
    for split in plan.splits:
        over = f"over {split.axis}" if split.axis else f"in {split.parts} co-shards"
        counts[over] = counts.get(over, 0) + 1
    shown = [f"{count} patterns of operators {over}" for over, count in counts.items()]
    return "; ".join(shown) or "none"


def order(plan: Plan) -> Any:
    """Return the table of actions, the first of each position."""
    rows = [
        [stage, " ".join(str(action) for action in row[:24]) + (" ..." if len(row) > 24 else "")]
        for stage, row in enumerate(plan.order)
    ]
    return view.table("Order (stage, F B I or W, microbatch)", ["position>", "actions"], rows)


def considered(plan: Plan) -> Any:
    """Return what else was weighed when the plan was made."""
    rows = [
        [
            other.description,
            format_seconds(other.step_s) if other.step_s is not None else "",
            format_bytes(other.peak_bytes) if other.peak_bytes is not None else "",
            other.reason,
        ]
        for other in plan.considered
    ]
    columns = ["also considered", "step, predicted>", "memory, predicted>", "why not"]
    return view.table("Considered", columns, rows)
