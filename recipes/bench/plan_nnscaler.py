#!/usr/bin/env python
"""nnScaler's plans for a GPT of 8 layers on 8 H100, and this project's, under one cost model.

    git clone https://github.com/microsoft/nnscaler NN && git -C NN checkout 1585c15
    pip install --target NN/packages dill more-itertools pulp "pybind11<3" tqdm
    python recipes/bench/plan_nnscaler.py --checkout NN -o plan-nnscaler.json

nnScaler 0.8 has one size of microbatch in a search: it is run for each of `--cases`, samples x
microbatches of one batch. Its plan is then written in this project's terms and predicted as ours
is, the update included. Search times are measured on this machine; steps are predicted. What
nnScaler is given instead of a GPU is said in nnscaler_driver.py. Two lines of the checkout are
changed for torch 2.13, and its solver is compiled.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from plan_search import timed
from rich.console import Console
from rich.table import Table

from toolkit.hardware import find_cluster
from toolkit.ir.graph import OpGraph
from toolkit.plan import library, predict, subject
from toolkit.plan.order import simple
from toolkit.plan.plan import Axis, Placement, Plan, Split, Stage
from toolkit.plan.program import rules, select
from toolkit.units import format_seconds

_HERE = Path(__file__).resolve().parent
_MODEL, _CLUSTER = "plan_search:eight_layers", "h100x8"
_OURS = "GPT of 8 layers, 8 H100"
_EMBEDDING, _HEAD, _LOSS = "token_embedding:embedding", "head:linear", ":cross_entropy_loss"
_PER_BLOCK = 6  # Linears
# What torch 2.13 does otherwise: (file, as it is, as it has to be).
_CHANGES = (
    (
        "graph/tracer/concrete_tracer.py",
        "and not func.__qualname__.startswith('PyCapsule'):",
        "and not func.__qualname__.startswith(('PyCapsule', 'pybind11')):",
    ),
    (
        "graph/tracer/torch_fx_patcher.py",
        "def is_impure_new(node: fx_node.Node):",
        "def is_impure_new(node: fx_node.Node, *_ignored):",
    ),
)


def prepare(checkout: Path) -> None:
    """Change the checkout for torch 2.13 and compile its solver, where that has not been done."""
    for file, before, after in _CHANGES:
        path = checkout / "nnscaler" / file
        text = path.read_text()
        if after not in text:
            if before not in text:
                sys.exit(f"{path} has no line '{before}': check out commit 1585c15")
            path.write_text(text.replace(before, after))
    source = checkout / "nnscaler" / "autodist" / "dp_solver.cpp"
    library_file = source.with_suffix(str(sysconfig.get_config_var("EXT_SUFFIX")))
    if not library_file.exists():
        folders = [sysconfig.get_paths()["include"], str(checkout / "packages/pybind11/include")]
        includes = [f"-I{folder}" for folder in folders]
        command = ["g++", "-O3", "-std=c++17", "-shared", "-fPIC", *includes, str(source)]
        subprocess.run([*command, "-o", str(library_file)], check=True)


def solved(checkout: Path, samples: int, microbatches: int) -> dict[str, Any]:
    """Run nnScaler on one size of microbatch, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(_HERE / "nnscaler_driver.py"), str(checkout)]
        done = subprocess.run(
            [*command, str(samples), str(microbatches), folder],
            check=False, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    if done.returncode:
        sys.exit(f"nnScaler failed on {samples} x {microbatches}; see above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def priced(found: dict[str, Any]) -> float:
    """Predict nnScaler's plan, in seconds a step."""
    samples, count = found["samples"], found["microbatches"]
    sys.path.insert(0, str(_HERE))
    traced = subject.load(_MODEL, dtype="bfloat16", batch=samples * count)
    graph = traced.graph.at(batch=samples)
    stages = found["stages"]
    widths = [stage["devices"] for stage in stages]
    ends = [0, *accumulate(_blocks(stage) for stage in stages)]
    positions = [0, *accumulate(widths)]
    if ends[-1] != len(traced.blocks):
        sys.exit(f"nnScaler's stages have {ends[-1]} blocks of {len(traced.blocks)}")
    made = tuple(
        Stage(
            traced.blocks[ends[at]] if at else None,
            traced.blocks[ends[at] : ends[at + 1]],
            tuple(range(positions[at], positions[at + 1])),
        )
        for at in range(len(stages))
    )
    rows = simple.one_f_one_b(len(stages), count).rows
    plan = Plan(
        strategy="nnscaler",
        provenance=traced.provenance(find_cluster(_CLUSTER)),
        mesh=(Axis("pipeline", sum(widths)),),
        placements=tuple(Placement(path, "data", "replicate") for path in (*traced.blocks, "")),
        stages=made,
        microbatches=count,
        schedule="custom",
        order=tuple(row for row, width in zip(rows, widths, strict=True) for _ in range(width)),
        splits=tuple(_splits(graph, made, stages)),
    )
    prediction = predict.predict(plan, traced, find_cluster(_CLUSTER)).prediction
    assert prediction is not None
    return prediction.step_s


def _blocks(stage: dict[str, Any]) -> int:
    """How many blocks a stage has, whose Linears must be divided by samples if at all."""
    inside = 0
    for one in stage["divided"]:
        if one["kind"] == "linear" and one["how"] in ("whole", "input 0 dim 0"):
            inside += one["count"]
    return inside // _PER_BLOCK


def _splits(
    graph: OpGraph, stages: Sequence[Stage], found: Sequence[dict[str, Any]]
) -> list[Split]:
    """Everything by samples, but for the ends where nnScaler has them by vocabulary or whole.

    Exits where it divided anything else otherwise: then this translation says nothing.
    """
    annotations = {op.name: rules.annotation(op, graph) for op in graph.ops}

    def flow(start: str, dim: int) -> dict[str, str]:
        return select.flow(graph, lambda op: annotations[op.name], [start], dim)

    dims = flow("ids_BT", 0) | flow("targets_BT", 0)
    for at, stage in enumerate(found):
        several = stage["devices"] > 1
        for one in stage["divided"] if several else ():
            kind, how = one["kind"], one["how"]
            if how == "input 0 dim 0" or (how == "whole" and kind in ("getitem", "arange")):
                continue
            if kind == "embedding" and how == "input 1 dim 1":
                dims[_EMBEDDING] = "v"
            elif kind == "linear" and how == "input 1 dim 0" and at == len(found) - 1:
                dims |= flow(_HEAD, -1)
            elif kind == "cross_entropy" and how == "whole":
                dims.pop(_LOSS, None)
            elif kind in ("view", "embedding", "add"):
                continue  # follows what it reads; the positions' table is alike for all samples
            else:
                sys.exit(f"nnScaler divided {kind} by {how}, which is not translated")
    entries = {stage.begins_at: at for at, stage in enumerate(stages) if stage.begins_at}
    splits, at = [], 0
    for op in graph.ops:
        for path, entry in entries.items():
            if f"{op.module_path}.".startswith(f"{path}."):
                at = entry
        if op.name in dims and len(stages[at].devices) > 1:
            splits.append(Split(op.name, dims[op.name], "pipeline"))
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkout", type=Path, required=True, help="nnScaler's source")
    parser.add_argument("--cases", nargs="+", default=["32x1", "8x4", "4x8"])
    parser.add_argument("--output", "-o", type=Path, help="the JSON file to write")
    options = parser.parse_args()
    checkout = options.checkout.resolve()
    prepare(checkout)
    rows = []
    for case in options.cases:
        found = solved(checkout, *(int(size) for size in case.split("x")))
        rows.append({**found, "step_s": priced(found)})
    ours = timed(_OURS)
    traced = subject.load(_MODEL, dtype="bfloat16", batch=32)
    replicated = library.find("dp")(traced, find_cluster(_CLUSTER))
    prediction = predict.predict(replicated, traced, find_cluster(_CLUSTER)).prediction
    assert prediction is not None
    table = Table(title="Searches measured, steps predicted: a GPT of 8 layers, 8 H100, batch 32")
    for column in ("", "search", "of it not counted: tracing", "plan", "own estimate", "our cost"):
        table.add_column(column, overflow="fold")
    for row in rows:
        devices = ", ".join(str(stage["devices"]) for stage in row["stages"])
        table.add_row(
            f"nnScaler, {row['samples']} samples x {row['microbatches']}",
            *(format_seconds(row[key]) for key in ("search_s", "trace_s")),
            f"stages of {devices}",
            *(format_seconds(row[key]) for key in ("own_estimate_s", "step_s")),
        )
    table.add_row(
        "toolkit", *(format_seconds(ours[key]) for key in ("search_s", "trace_s")), ours["plan"],
        "", format_seconds(ours["predicted_step_s"]),
    )  # fmt: skip
    table.add_row("data parallel", "", "", "", "", format_seconds(prediction.step_s))
    Console().print(table)
    if options.output:
        result = {"nnscaler": rows, "toolkit": ours, "data_parallel_step_s": prediction.step_s}
        options.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
