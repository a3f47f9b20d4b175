#!/usr/bin/env python
"""How long the search takes, and how much memory: two models, each in a fresh process.

    python recipes/bench/plan_search.py -o plan-search.json

- llama3-70b on 1,024 H100 (128xdgx-h100), batch 1,024, bfloat16;
- a GPT of 8 layers on 8 H100 (h100x8), batch 32, bfloat16, pipelines included.

Seconds are wall time on this machine: importing, tracing, and the search itself; the steps of the
plans found are predicted, not measured.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from toolkit.units import format_bytes, format_seconds

_HERE = str(Path(__file__).resolve().parent)
CASES: dict[str, dict[str, Any]] = {
    "llama3-70b, 1,024 H100": {"model": "llama3-70b", "cluster": "128xdgx-h100", "batch": 1024},
    "GPT of 8 layers, 8 H100": {
        "model": "plan_search:eight_layers", "cluster": "h100x8", "batch": 32,
    },
}  # fmt: skip


def eight_layers(batch: int = 8, tokens: int = 1024) -> Any:
    """A GPT of 8 layers, 1,024 wide, on 1,024 tokens, with a vocabulary of 32,768."""
    import torch

    from toolkit.models import gpt

    model = gpt.GPT(gpt.Config(8, 1024, 16, 32768, 1024, False, "eight-layers"))
    ids = torch.randint(0, 32768, (batch, tokens + 1))
    return model, (), {"ids_BT": ids[:, :-1], "targets_BT": ids[:, 1:]}


def timed(name: str) -> dict[str, Any]:
    """Search one case in this process and say what it took."""
    began_s = time.perf_counter()
    from toolkit.hardware import find_cluster
    from toolkit.plan import subject
    from toolkit.plan.search import search

    case = CASES[name]
    imported_s = time.perf_counter()
    sys.path.insert(0, _HERE)
    traced = subject.load(case["model"], dtype="bfloat16", batch=case["batch"])
    traced_s = time.perf_counter()
    found = search(traced, find_cluster(case["cluster"]))
    ended_s = time.perf_counter()
    prediction = found.plan.prediction
    assert prediction is not None
    return {
        "case": name,
        **case,
        "import_s": imported_s - began_s,
        "trace_s": traced_s - imported_s,
        "search_s": ended_s - traced_s,
        "wall_s": ended_s - began_s,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "plan": found.best.description,
        "predicted_step_s": prediction.step_s,
        "predicted_mfu": prediction.mfu,
        "predicted_peak_bytes": prediction.peak_bytes,
        "considered": found.considered,
        "pruned": found.pruned,
        "complete": found.complete,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", "-o", type=Path, help="the JSON file to write")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(timed(options.case)))
        return
    rows = []
    for name in CASES:
        command = [sys.executable, __file__, "--case", name]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{name} failed; see above")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    table = Table(title="Search for a plan: wall time and memory measured, steps predicted")
    for column in ("case", "wall", "of it tracing", "searching", "peak RSS", "step", "plan"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(
            row["case"],
            *(format_seconds(row[key]) for key in ("wall_s", "trace_s", "search_s")),
            format_bytes(row["peak_rss_bytes"]),
            format_seconds(row["predicted_step_s"]),
            row["plan"],
        )
    Console().print(table)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
