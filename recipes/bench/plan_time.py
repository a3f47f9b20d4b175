#!/usr/bin/env python
"""Step time, predicted against measured: library plans on gloo ranks of this machine.

    toolkit hardware probe
    python recipes/bench/plan_time.py --output plan-time.json

First the ranks run each model's operators, one by one, at sizes that no plan below runs, and small
Linears wrapped by DTensor and FSDP2; from what those took, and from the probed collectives, every
plan's step is predicted before it is run. Then each is trained for a few steps (AdamW included).
Timings need a quiet machine: where a step's wall time is far above the processors' time in the
output, something else ran.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

_HERE = Path(__file__).resolve().parent

if TYPE_CHECKING:
    from toolkit.cost.calibration import Calibration
    from toolkit.hardware import Cluster
    from toolkit.plan.plan import Plan

# Model -> its reference, the sizes its plans run at, and those it is profiled at.
MODELS: dict[str, tuple[str, dict[str, int], list[dict[str, int]]]] = {
    "gpt": (
        "gpt-mini", {"batch": 8, "tokens": 128},
        [{"batch": 1, "tokens": 32}, {"batch": 1, "tokens": 192}, {"batch": 3, "tokens": 96},
         {"batch": 2, "tokens": 256}],
    ),
    "swin": ("small_models:swin", {"batch": 8}, [{"batch": 1}, {"batch": 3}]),
    "evoformer": (
        "small_models:evoformer", {"batch": 4},
        [{"batch": 1, "tokens": 16, "sequences": 8}, {"batch": 1, "tokens": 40, "sequences": 20},
         {"batch": 2, "tokens": 32, "sequences": 32}],
    ),
}  # fmt: skip
# The first that a strategy can use.
MICROBATCHES = (2, 4, 8)
_WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--strategies", nargs="+", help="default: all of the library")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument(
        "--calibrations",
        type=Path,
        metavar="OUTPUT",
        help="use those kept beside this earlier output instead of profiling",
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    from rich.console import Console

    from toolkit.cost.calibration import Calibration
    from toolkit.hardware import find_cluster

    console = Console(highlight=False)
    cluster = find_cluster(f"cpux{options.ranks}")
    if not cluster.device(0).measured:
        console.print("this machine is not probed: run `toolkit hardware probe` first")
        sys.exit(2)
    if options.calibrations:
        calibrations = {
            model: Calibration.load(calibration_path(options.calibrations, model))
            for model in options.models
        }
    else:
        calibrations = profiled(options.models, cluster, options.output)
    rows: list[dict[str, Any]] = []
    for model in options.models:
        plans = made(model, cluster, calibrations[model], options.strategies)
        rows += compare(model, plans, options.ranks, options.steps)
    show(console, rows)
    if options.output:
        from toolkit import record

        record.write(options.output, kind="plan-time", version=1, body={"rows": rows})


def profiled(models: list[str], cluster: Cluster, output: Path | None) -> dict[str, Calibration]:
    """Return a calibration for each model, which is kept beside the output.

    Classes are fitted to the operators of all models, and what sets an operator apart to its own.
    """
    from toolkit.plan import profile

    observations = {}
    for model in models:
        reference, _, samples = MODELS[model]
        print(f"profiling {model}", flush=True)
        observations[model] = profile.observe(
            [(reference, sizes) for sizes in samples], cluster.num_devices
        )
    found = {}
    for model, own in observations.items():
        others = [one for name, them in observations.items() if name != model for one in them]
        found[model] = profile.calibration(own, cluster.device(0), others=others)
        if output:
            found[model].save(calibration_path(output, model))
    return found


def calibration_path(output: Path, model: str) -> Path:
    """Return where a model's calibration is kept."""
    return output.with_name(f"{output.stem}-{model}-calibration.json")


def made(
    model: str, cluster: Cluster, calibration: Calibration, strategies: list[str] | None
) -> dict[str, Plan]:
    """Return every library plan that applies, predicted."""
    from toolkit.errors import InfeasibleError
    from toolkit.plan import library, planner, subject

    reference, sizes, _ = MODELS[model]
    traced = subject.load(reference, **sizes)
    found: dict[str, Plan] = {}
    for strategy in strategies or library.STRATEGIES:
        for microbatches in MICROBATCHES:
            try:
                found[strategy] = planner.make(
                    traced, cluster, strategy, num_ranks=cluster.num_devices,
                    microbatches=microbatches, calibration=calibration,
                )  # fmt: skip
            except InfeasibleError:
                continue
            break
    return found


def compare(model: str, plans: dict[str, Plan], num_ranks: int, steps: int) -> list[dict[str, Any]]:
    """Run the plans, each in fresh ranks, and return its row."""
    from toolkit.errors import ToolkitError
    from toolkit.plan import io, launch

    rows = []
    for strategy, plan in plans.items():
        assert plan.prediction is not None
        with tempfile.TemporaryDirectory(prefix="plan-time-") as folder:
            path, out = Path(folder) / "plan.json", Path(folder) / "seconds.json"
            io.save(plan, path)
            try:
                launch.run([__file__, str(out), str(path), str(steps)], num_ranks)
            except ToolkitError as error:
                print(f"{model} {strategy}: {error}", file=sys.stderr)
                continue
            seconds = json.loads(out.read_text())
        measured_s = statistics.median(seconds["step_s"])
        error = plan.prediction.step_s / measured_s - 1
        print(f"{model:10} {strategy:18} predicted {plan.prediction.step_s:.3f} s, measured "
              f"{measured_s:.3f} s, {error:+.1%}", flush=True)  # fmt: skip
        rows.append({
            "model": model, "plan": strategy, "microbatches": plan.microbatches,
            "predicted_step_s": plan.prediction.step_s, "measured_step_s": measured_s,
            "error": error, **seconds,
        })  # fmt: skip
    return rows


def rank(out: Path, path: Path, steps: int) -> None:
    """What each rank runs: training steps of one plan."""
    import torch
    import torch.distributed as dist

    from toolkit.plan import io, runtime

    with runtime.session() as here:
        plan = io.load(path)
        batch = runtime.example(plan, here, batch=plan.provenance.sizes["batch"], seed=1)
        lowered = runtime.prepare(plan, here)
        optimizer = torch.optim.AdamW(runtime.optimizer_groups(lowered))
        seconds: list[tuple[float, float]] = []
        for _ in range(_WARM_UP + steps):
            runtime.synchronise(lowered)
            started_s, computed_s = time.perf_counter(), time.process_time()
            lowered.zero_gradients()
            lowered.step(batch)
            optimizer.step()
            lowered.after_update()
            seconds.append((time.perf_counter() - started_s, time.process_time() - computed_s))
        gathered: list[Any] = [None] * here.num_ranks
        dist.all_gather_object(gathered, seconds[_WARM_UP:])
        if here.rank == 0:
            # A step ends when its last rank has; processors' time is a rank's own.
            by_step = list(zip(*gathered, strict=True))
            out.write_text(json.dumps({
                "step_s": [max(wall for wall, _ in ranks) for ranks in by_step],
                "processor_s": [[used for _, used in ranks] for ranks in by_step],
            }))  # fmt: skip
    runtime.leave()


def show(console: Any, rows: list[dict[str, Any]]) -> None:
    """Print the table, and the median error of each model and of all."""
    from rich.table import Table

    from toolkit.units import format_seconds

    table = Table(title="one training step, predicted and measured", title_justify="left")
    for column in ("model", "plan", "predicted", "measured", "error"):
        table.add_column(column, justify="left" if column in ("model", "plan") else "right")
    for row in rows:
        table.add_row(
            row["model"], row["plan"], format_seconds(row["predicted_step_s"]),
            format_seconds(row["measured_step_s"]), f"{row['error']:+.1%}",
        )  # fmt: skip
    console.print(table)
    for model in (*dict.fromkeys(row["model"] for row in rows), "all"):
        errors = [abs(row["error"]) for row in rows if model in (row["model"], "all")]
        console.print(f"{model}: median |error| {statistics.median(errors):.1%}, largest "
                      f"{max(errors):.1%}, {len(errors)} plans")  # fmt: skip


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_HERE), os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, str(_HERE))
    if "RANK" in os.environ:
        rank(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
