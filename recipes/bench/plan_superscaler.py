#!/usr/bin/env python
"""Best plans in four spaces, simulated on V100s: what each way of planning could reach.

    python recipes/bench/plan_superscaler.py --models swin,t5 --devices 4,8 -o superscaler.json

Models and sizes follow SuperScaler's evaluation (arXiv 2301.08984): weak scaling on DGX-2 machines
of 16 V100 with 32 GB, float16. Nothing is run: every figure is simulated, under one cost model, and
says what a space holds, not how well a system uses it. The spaces, all searched by the same search:

deepspeed  no pipeline; data parallel with ZeRO-1, 2 or 3; tensor parallel by heads, features and
           vocabulary; recomputation; states on the host where nothing fits without
megatron   tensor parallel as above; 1F1B or interleaved pipelines; data parallel replicated or
           with ZeRO-1; recomputation
alpa       each operator split as an integer program finds; 1F1B pipelines; replicated over data;
           recomputation
ours       all of that, every schedule, and co-shard, interlaced pipelines and 3F1B

Ours contains the other spaces, and looks at what is quick to lay out first. Should a search end by
its time limit with a worse plan than another space's, that plan is taken, and the table says so.
Megatron's sequence parallelism is in no space by that name; splits by tokens are among what the
integer program finds, as are axial splits of an Evoformer.

`--as scripts` holds each system to what the artifact's scripts gave it, as far as is known (see
SCRIPTS): then a ratio says what those settings cost, not what a space lacks. Where a baseline runs
another batch than ours, samples a second are compared.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
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
SPACES: dict[str, dict[str, Any]] = {
    "deepspeed": {
        "pipeline": 1, "context": 1, "splits": ["regions"], "plans": [],
        "parameters": ["shard_optimizer", "shard_gradients", "shard"],
    },
    "megatron": {
        "context": 1, "splits": ["regions"], "plans": [], "schedules": ["1f1b", "interleaved"],
        "parameters": ["replicate", "shard_optimizer"], "offload": ["none"],
    },
    "alpa": {
        "splits": ["searched"], "plans": [], "schedules": ["1f1b"], "parameters": ["replicate"],
        "offload": ["none"],
    },
    "ours": {"splits": ["regions", "searched"]},
}  # fmt: skip
_BASELINE = {"plans": [], "recompute": ["all"]}
_DEEPSPEED = {
    **_BASELINE, "pipeline": 1, "context": 1, "splits": ["heads"],
    "parameters": ["shard_optimizer", "shard_gradients", "shard"],
}  # fmt: skip
_ALPA = {
    **_BASELINE, "pipeline": 1, "splits": ["searched"], "parameters": ["replicate"],
    "offload": ["none"],
}  # fmt: skip


def _scripts(family: str, devices: int) -> dict[str, dict[str, Any]]:
    """What the artifact's scripts gave each system; "batch" where it is not the global one.

    Of Swin the baselines' settings are known: DeepSpeed's tensor degree and its offload to the
    host, Alpa without pipelines, both at 16 samples from 16 devices on. Of T5 ours are, and the
    baselines are read as the systems were then: no split of the vocabulary, stages of as many
    layers each. For AlphaFold 2 the baseline is read as data parallel with axial splits.
    """
    ours: dict[str, Any] = {"splits": ["regions", "searched"]}
    if family == "swin":
        degree, stages = {4: (2, 2), 8: (4, 2), 16: (4, 4), 32: (8, 4)}[devices]
        batch = {"batch": 16} if devices >= 16 else {}
        offload = {"offload": ["optimizer", "parameters"]}
        return {
            "deepspeed": {**_DEEPSPEED, "tensor": degree, **offload, **batch},
            "alpa": {**_ALPA, **batch},
            "ours": {**ours, "max_pipeline": stages},
        }
    if family == "t5":
        most = {4: 1, 8: 2, 16: 4, 32: 8}[devices]
        return {
            "deepspeed": _DEEPSPEED,
            "megatron": {
                **_BASELINE, "context": 1, "splits": ["heads"], "schedules": ["1f1b"],
                "parameters": ["replicate"], "equal_stages": True, "offload": ["none"],
            },
            "alpa": _ALPA,
            "ours": {**ours, "max_pipeline": 4, "max_tensor": most},
        }  # fmt: skip
    if family == "evoformer":
        return {"dap": {**_ALPA, "tensor": 1}, "ours": ours}
    return {}


console = Console(stderr=True, highlight=False)


def searched(
    traced: subject.Subject, devices: int, space: str, wanted: dict[str, Any], limit_s: float
) -> dict[str, Any]:
    """Return the best plan of a space, or why there is none."""
    family = next(name for name in FAMILIES if traced.model in FAMILIES[name].values())
    cluster = find_cluster("dgx2" if devices <= 16 else f"{devices // 16}xdgx2")
    began_s = time.monotonic()
    cell: dict[str, Any] = {"space": space, "constraints": wanted, "batch": traced.batch}
    given = {"microbatch_size": MICROBATCH.get(family), "runnable": False, **wanted}
    batch = given.pop("batch", traced.batch)
    if batch != traced.batch:
        traced = replace(traced, graph=traced.graph.at(batch=batch))
        cell["batch"] = batch
    try:
        found = search(
            traced, cluster, num_ranks=devices, time_limit_s=limit_s,
            constraints=Constraints(**given),
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


def compared(
    traced: subject.Subject, family: str, devices: int, spaces: dict[str, Any], limit_s: float
) -> dict[str, Any]:
    """Return all cells of a model."""
    cells = []
    for space, wanted in spaces.items():
        cells.append(searched(traced, devices, space, wanted, limit_s))
        console.print(f"  {space:10} {_cell(cells[-1])}  ({cells[-1]['search_s']:.0f} s)")
    if all(cell["batch"] == traced.batch for cell in cells) and spaces is SPACES:
        _take_best(cells)
    rates = {cell["space"]: cell["batch"] / cell["step_s"] for cell in cells if "step_s" in cell}
    own = rates.pop("ours", None)
    return {
        "family": family, "model": traced.model, "devices": devices, "batch": traced.batch,
        "dtype": "float16", "kind": "simulated", "cells": cells,
        "gains": {name: own / rate for name, rate in rates.items()} if own else {},
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


def shown(rows: list[dict[str, Any]], title: str) -> Table:
    """Return the table: one row a model."""
    names = list(dict.fromkeys(cell["space"] for row in rows for cell in row["cells"]))
    names = [*(name for name in names if name != "ours"), "ours"]
    table = Table(title=title, show_lines=True)
    for name in ("model", "devices, batch", *names, "ours is faster than"):
        table.add_column(name, overflow="fold")
    for row in rows:
        cells = {cell["space"]: _cell(cell) for cell in row["cells"]}
        gains = sorted(row["gains"].items(), key=lambda one: one[1])
        gain = "\n".join(f"{name} {ratio:.2f}x" for name, ratio in gains) or "nothing else fits"
        if "infeasible" in row["cells"][-1]:
            gain = "does not fit"
        shown_cells = [cells.get(name, "") for name in names]
        table.add_row(row["model"], f"{row['devices']}, {row['batch']}", *shown_cells, gain)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default=",".join(FAMILIES), help="families, by comma")
    parser.add_argument("--devices", default="4,8,16,32", help="numbers of devices, by comma")
    parser.add_argument("--batch", type=int, default=BATCH, help="samples in the global batch")
    parser.add_argument("--time-limit", type=float, default=60, help="seconds of each search")
    parser.add_argument(
        "--as",
        dest="table",
        choices=("spaces", "scripts", "both"),
        default="spaces",
        help="whole spaces, or as the paper's scripts ran them",
    )
    parser.add_argument("--output", "-o", type=Path, help="the JSON file to write")
    options = parser.parse_args()
    rows: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("spaces", "scripts") if options.table in (name, "both")
    }
    for devices in map(int, options.devices.split(",")):
        for family in options.models.split(","):
            try:
                model = FAMILIES[family][devices]
                began_s = time.monotonic()
                traced = subject.load(model, dtype="float16", batch=options.batch)
                console.print(f"{model}, traced in {time.monotonic() - began_s:.0f} s")
                for name, found in rows.items():
                    spaces = SPACES if name == "spaces" else _scripts(family, devices)
                    if spaces:
                        console.print(f" {name}")
                        found.append(compared(traced, family, devices, spaces, options.time_limit))
            except (ToolkitError, KeyError) as error:
                parser.error(f"{family} on {devices} devices: {error}")
            if options.output:
                options.output.write_text(json.dumps(rows, indent=1))
    titles = {
        "spaces": "best plan of each space",
        "scripts": "each system held to what the paper's scripts gave it",
    }
    console_out = Console(width=200 if not console.is_terminal else None)
    for name, found in rows.items():
        where = "Simulated steps, V100-32GB in DGX-2 machines, float16"
        console_out.print(shown(found, f"{where}; {titles[name]}"))


if __name__ == "__main__":
    main()
