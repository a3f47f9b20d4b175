#!/usr/bin/env python
"""Best plans in four spaces, simulated on V100s: what each way of planning could reach.

    python recipes/bench/plan_superscaler.py --models swin,t5 --devices 4,8 -o superscaler.json

Models and sizes follow SuperScaler's evaluation (arXiv 2301.08984): weak scaling on DGX-2 machines
of 16 V100 with 32 GB, float16. Nothing is run: every figure is simulated, under one cost model, and
says what a space holds, not how well a system uses it. The spaces, all searched by the same search:

deepspeed  no pipeline; data parallel with ZeRO-1, 2 or 3; tensor parallel by heads, features and
           vocabulary; recomputation
megatron   tensor parallel as above; 1F1B or interleaved pipelines; data parallel replicated or
           with ZeRO-1; recomputation
alpa       each operator split as an integer program finds; 1F1B pipelines; replicated over data;
           recomputation
ours       all of that, every schedule, and co-shard, interlaced pipelines, 3F1B and axial splits

Ours contains the other spaces. Each search has the same time, and the largest space may be left
before it is looked through: where another's plan is better than what was found, it is taken, and
the table says from which. Megatron's sequence parallelism is in no space by that name; splits by
tokens are among what the integer program finds.

Models that run their blocks several times (Evoformer) are outside what the search lays out: there
the spaces are plans of the library, deepspeed and megatron data parallel without ZeRO and without
tensor parallelism, alpa with axial splits too.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from toolkit.errors import InfeasibleError, ToolkitError
from toolkit.hardware import find_cluster
from toolkit.plan import subject
from toolkit.plan.lower import ladder
from toolkit.plan.search import Constraints, search
from toolkit.units import format_bytes, format_seconds

# Model of each number of devices.
FAMILIES = {
    "swin": {4: "swin-1.8b", 8: "swin-4.9b", 16: "swin-10b", 32: "swin-27b"},
    "t5": {n: f"t5-big-embedding-{n}" for n in (4, 8, 16, 32)},
    "evoformer": {
        4: "evoformer-87m", 8: "evoformer-930m", 16: "evoformer-2.4b", 32: "evoformer-3.2b",
    },
    "gpt": {4: "gpt3-1.3b", 8: "gpt3-2.7b", 16: "gpt3-6.7b", 32: "gpt3-15b"},
}  # fmt: skip
BATCH = 256
# A swin's samples are images of 1536 x 1536: one is a microbatch, as in the evaluation.
MICROBATCH = {"swin": 1}
_REGIONS = ["regions"]
SPACES: dict[str, dict[str, Any]] = {
    "deepspeed": {
        "pipeline": 1, "context": 1, "splits": _REGIONS, "plans": [],
        "parameters": ["shard_optimizer", "shard_gradients", "shard"],
    },
    "megatron": {
        "context": 1, "splits": _REGIONS, "plans": [], "schedules": ["1f1b", "interleaved"],
        "parameters": ["replicate", "shard_optimizer"],
    },
    "alpa": {
        "splits": ["searched"], "plans": [], "schedules": ["1f1b"], "parameters": ["replicate"],
    },
    "ours": {"splits": ["regions", "searched"]},
}  # fmt: skip
# The same for models that run their blocks several times.
SEVERAL_PASSES: dict[str, dict[str, Any]] = {
    "deepspeed": {"plans": ["dap"], "context": 1, "pipeline": 1},
    "megatron": {"plans": ["dap"], "context": 1, "pipeline": 1},
    "alpa": {"plans": ["dap"], "pipeline": 1},
    "ours": {},
}
console = Console(stderr=True, highlight=False)


def searched(traced: subject.Subject, devices: int, space: str, limit_s: float) -> dict[str, Any]:
    """Return the best plan of a space, or why there is none."""
    family = next(name for name in FAMILIES if traced.model in FAMILIES[name].values())
    wanted = (SEVERAL_PASSES if family == "evoformer" else SPACES)[space]
    cluster = find_cluster("dgx2" if devices <= 16 else f"{devices // 16}xdgx2")
    began_s = time.monotonic()
    cell: dict[str, Any] = {"space": space, "constraints": wanted}
    try:
        found = search(
            traced, cluster, num_ranks=devices, time_limit_s=limit_s,
            constraints=Constraints(
                **wanted, microbatch_size=MICROBATCH.get(family), runnable=False
            ),
        )  # fmt: skip
    except InfeasibleError as error:
        return {**cell, "infeasible": str(error), "search_s": time.monotonic() - began_s}
    prediction = found.plan.prediction
    assert prediction is not None
    # The search's own estimate prices gathered tensors whole, a prediction does not everywhere.
    step_s = max(prediction.step_s, found.best.step_s)
    return {
        **cell,
        "step_s": step_s,
        "predicted_step_s": prediction.step_s,
        "estimated_step_s": found.best.step_s,
        "mfu": prediction.mfu * prediction.step_s / step_s,
        "peak_bytes": prediction.peak_bytes,
        "plan": found.best.description,
        "strategy": found.plan.strategy,
        "rung": ladder.rung(found.plan),
        "search_s": time.monotonic() - began_s,
        "complete": found.complete,
        "frontier": [
            {"plan": one.description, "step_s": one.step_s, "peak_bytes": one.peak_bytes}
            for one in found.frontier
        ],
    }


def compared(family: str, devices: int, batch: int, limit_s: float) -> dict[str, Any]:
    """Return all cells of a model."""
    model = FAMILIES[family][devices]
    console.print(f"trace {model}")
    traced = subject.load(model, dtype="float16", batch=batch)
    cells = []
    for space in SPACES:
        cells.append(searched(traced, devices, space, limit_s))
        console.print(f"  {space:10} {_cell(cells[-1])}  ({cells[-1]['search_s']:.0f} s)")
    _take_best(cells)
    steps = {cell["space"]: cell.get("step_s") for cell in cells}
    others = {name: step for name, step in steps.items() if name != "ours" and step}
    best = min(others, key=lambda name: others[name], default=None)
    ratio = others[best] / steps["ours"] if best and steps["ours"] else None
    return {
        "family": family, "model": model, "devices": devices, "batch": batch, "dtype": "float16",
        "kind": "simulated", "cells": cells, "best_baseline": best, "gain": ratio,
    }  # fmt: skip


def _take_best(cells: list[dict[str, Any]]) -> None:
    """Give ours, the last, the best plan of all spaces, saying where it was found."""
    *others, ours = cells
    best = min(others, key=lambda cell: cell.get("step_s", float("inf")))
    if best.get("step_s", float("inf")) < ours.get("step_s", float("inf")):
        own = ours.get("step_s")
        cells[-1] = {**best, "space": "ours", "taken_from": best["space"], "own_step_s": own}


def _cell(cell: dict[str, Any]) -> str:
    if "infeasible" in cell:
        return "does not fit" if "fits" in cell["infeasible"] else "no plan"
    late = "" if cell["complete"] else " (time ran out)"
    if "taken_from" in cell:
        return f"{format_seconds(cell['step_s'])}, the plan of {cell['taken_from']}"
    figures = f"{format_seconds(cell['step_s'])}, {format_bytes(cell['peak_bytes'])}{late}"
    return f"{figures}\n{cell['plan']}"


def shown(rows: list[dict[str, Any]]) -> Table:
    """Return the table: one row a model."""
    table = Table(
        title="Simulated steps, V100-32GB in DGX-2 machines, float16; best plan of each space",
        show_lines=True,
    )
    for name in ("model", "devices, batch", *SPACES, "ours against the best other"):
        table.add_column(name, overflow="fold")
    for row in rows:
        cells = [_cell(cell) for cell in row["cells"]]
        gain = f"{row['gain']:.2f}x ({row['best_baseline']})" if row["gain"] else "no other fits"
        if "infeasible" in row["cells"][-1]:
            gain = "does not fit"
        table.add_row(row["model"], f"{row['devices']}, {row['batch']}", *cells, gain)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default=",".join(FAMILIES), help="families, by comma")
    parser.add_argument("--devices", default="4,8,16,32", help="numbers of devices, by comma")
    parser.add_argument("--batch", type=int, default=BATCH, help="samples in the global batch")
    parser.add_argument("--time-limit", type=float, default=60, help="seconds of each search")
    parser.add_argument("--output", "-o", type=Path, help="the JSON file to write")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for devices in map(int, options.devices.split(",")):
        for family in options.models.split(","):
            try:
                rows.append(compared(family, devices, options.batch, options.time_limit))
            except (ToolkitError, KeyError) as error:
                parser.error(f"{family} on {devices} devices: {error}")
            if options.output:
                options.output.write_text(json.dumps(rows, indent=1))
    Console(width=200 if not console.is_terminal else None).print(shown(rows))


if __name__ == "__main__":
    main()
