"""A measured run of this folder's loads beside the simulator on the same requests.

    python recipes/bench/serve_vs_peers/simulated.py run.json --calibration kept.json

`run.json` is what `serve_vs_peers -o` wrote, of toolkit's contenders and cases that are Poisson
mixes; the calibration is `toolkit serve calibrate`'s of the same model, which has seen none of
them. For each figure: measured, simulated, and how far off that is.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from cases import CASES
from rich.console import Console
from rich.table import Table

from toolkit import record
from toolkit.serve.bench import report
from toolkit.serve.clock import VirtualClock
from toolkit.serve.simulate import systems
from toolkit.serve.simulate.drive import drive
from toolkit.serve.split.calibration import ServeCalibration
from toolkit.serve.split.controller import ControllerConfig

# Contender to simulated system and tokens a step; the options are contenders.py's.
_SYSTEMS = {
    "toolkit-int8": ("chunked", 256),
    "toolkit-int8-spf": ("chunked-spf", 256),
    "toolkit-int8-spf-64": ("chunked-spf", 64),
    "toolkit-int8-fixed": ("split-static-spf", 256),
    "toolkit-int8-auto": ("auto", 256),
}
_FIGURES = (
    ("ttft_s", "p50"), ("ttft_s", "p95"), ("tbt_s", "p50"), ("tbt_s", "p99"),
    ("e2e_s", "p50"), ("e2e_s", "p95"), ("output_tokens_per_s", None),
)  # fmt: skip
console = Console(highlight=False, width=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--tbt-target-ms", type=float, default=60.0, help="auto's, as it ran")
    options = parser.parse_args()
    body = record.read(options.run, kind="serve-vs-peers", version=1)["body"]
    kept = ServeCalibration.load(options.calibration)
    target_s = options.tbt_target_ms / 1000
    errors: dict[str, list[float]] = defaultdict(list)
    table = Table(title="measured / simulated: seconds, output tokens a second")
    for column in ("round", "load", "system", *(_name(*each) for each in _FIGURES)):
        table.add_column(column, justify="right")
    for number, found in enumerate(body["rounds"]):
        for case in body["cases"]:
            for contender in body["contenders"]:
                if contender not in _SYSTEMS or case not in found.get(contender, {}):
                    continue
                made = _simulated(contender, case, body["seed"] + number, kept, target_s)
                cells = []
                for key, part in _FIGURES:
                    live, said = _value(found[contender][case], key, part), _value(made, key, part)
                    errors[_name(key, part)].append(abs(said / live - 1))
                    cells.append(f"{live:.3g} / {said:.3g}")
                table.add_row(str(number), case, contender, *cells)
    console.print(table)
    for name, values in errors.items():
        console.print(
            f"{name}: median error {statistics.median(values):.1%}, largest {max(values):.1%}, "
            f"of {len(values)} runs"
        )


def _simulated(
    contender: str, case: str, seed: int, kept: ServeCalibration, target_s: float
) -> dict[str, Any]:
    name, step_tokens = _SYSTEMS[contender]
    setup = systems.Setup(
        kept.cost_model(),
        max_context=8192,
        kv_bytes=2 * 2**30,
        max_batch=32,
        step_tokens=step_tokens,
        controller=ControllerConfig(tbt_target_s=target_s),
    )
    clock = VirtualClock()
    engine = systems.find(name).build(setup, clock)
    return report.summary(drive(engine, clock, CASES[case].arrivals(seed)), report.Promise())


def _value(run: dict[str, Any], key: str, part: str | None) -> float:
    return float(run[key] if part is None else run[key][part])


def _name(key: str, part: str | None) -> str:
    return "out tok/s" if part is None else f"{key.removesuffix('_s')} {part}"


if __name__ == "__main__":
    main()
