#!/usr/bin/env python
"""Co-shard against keeping all activations and recomputing layers: memory and time, measured.

    python recipes/bench/plan_co_shard.py [--models gpt swin] [--parts 2 4] [--rounds 9] [-o FILE]

One rank, `--threads` threads, float32, batch 1. Peaks are tracked storage by storage over a step's
forward and backward, gradients of parameters left out: deterministic, so a busy machine changes
nothing. Times are of the same steps, no optimizer's; rounds alternate the order of the variants,
and what is compared is the ratio to recomputing layers within a round.

keep all      the plan of one device, run by torch
layers        every block under torch.utils.checkpoint
layers, own   the same plan on the executor that runs co-shards
co-shard n    heads and features in n parts, one after another, each run again
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from toolkit.plan.lower.lowered import Lowered
    from toolkit.plan.plan import Plan

_HERE = Path(__file__).resolve().parent
_KEEP, _LAYERS, _LAYERS_OWN = "keep all", "layers", "layers, own"


# The models -----------------------------------------------------------------------------------


def gpt(batch: int = 1, tokens: int = 2048) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Four layers of width 512 with eight heads, over a long sequence."""
    import torch

    from toolkit.models import gpt as gpts

    config = gpts.Config(4, 512, 8, 64, tokens, False, "benchmark")
    ids = torch.randint(0, config.vocab_size, (batch, tokens + 1))
    return gpts.GPT(config), (ids[:, :-1], ids[:, 1:]), {}


def swin(batch: int = 1) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Windows of 24 x 24 patches: the scores of one outweigh all else."""
    import torch

    from toolkit.models import swin as swins

    config = swins.Config(192, 24, (2, 2), 128, 4, "benchmark", num_labels=10)
    image, labels = torch.randn(batch, 3, 192, 192), torch.randint(0, 10, (batch,))
    return swins.Swin(config), (image, labels), {}


# What the rank runs ---------------------------------------------------------------------------


def rank_main(folder: Path, names: list[str], rounds: int, threads: int) -> None:
    """Track each variant's second step, then time rounds of steps."""
    import torch

    from toolkit.plan import io, runtime

    with runtime.session() as here:
        torch.set_num_threads(threads)
        steps: dict[str, Callable[[], None]] = {}
        peaks: dict[str, int] = {}
        for index, name in enumerate(names):
            plan = io.load(folder / f"{index}.json")
            lowered = _lowered(name, plan, here)
            batch = runtime.example(plan, here, batch=1, seed=1)
            steps[name] = _step(lowered, batch)
            peaks[name] = _peak_bytes(lowered, steps[name])
        times: list[dict[str, float]] = []
        for number in range(rounds):
            order = names if number % 2 == 0 else names[::-1]
            times.append({name: _seconds(steps[name]) for name in order})
    body = {"peak_bytes": peaks, "step_s": times}
    (folder / "found.json").write_text(json.dumps(body))
    runtime.leave()


def _lowered(name: str, plan: Plan, here: Any) -> Lowered:
    from toolkit.plan import runtime
    from toolkit.plan.lower import program
    from toolkit.plan.lower.recorder import Recorder

    if name != _LAYERS_OWN:
        return runtime.prepare(plan, here)
    example = runtime.example(plan, here, batch=1, seed=1)
    return program.lower(
        plan, runtime.build(plan, here), runtime.mesh_of(plan, here), Recorder(0), example
    )


def _step(lowered: Lowered, batch: Any) -> Callable[[], None]:
    def step() -> None:
        lowered.zero_gradients()
        lowered.step(batch)

    return step


def _peak_bytes(lowered: Lowered, step: Callable[[], None]) -> int:
    """The most a step holds at once, without parameters and their gradients."""
    from live_bytes import LiveBytes

    step()  # what is made once, is made
    with LiveBytes() as live:
        step()
    return live.peak(parameter.grad for parameter in lowered.parameters.values())


def _seconds(step: Callable[[], None]) -> float:
    started_s = time.perf_counter()
    step()
    return time.perf_counter() - started_s


# The comparison -------------------------------------------------------------------------------


def plans(model: str, parts: list[int]) -> dict[str, Plan]:
    """Return the plan of each variant."""
    from toolkit.hardware import find_cluster
    from toolkit.plan import subject
    from toolkit.plan.library import co_shard, data_parallel

    found, cluster = subject.load(f"plan_co_shard:{model}", batch=1), find_cluster("cpux1")
    layers = data_parallel.plan(found, cluster, recompute=True)
    return {
        _KEEP: data_parallel.plan(found, cluster),
        _LAYERS: layers,
        _LAYERS_OWN: layers,
        **{f"co-shard {n}": co_shard.plan(found, cluster, parts=n) for n in parts},
    }


def measure(model: str, parts: list[int], rounds: int, threads: int) -> dict[str, Any]:
    """Run all variants of a model in one process."""
    from toolkit.plan import io, launch

    variants = plans(model, parts)
    with tempfile.TemporaryDirectory(prefix="plan-co-shard-") as path:
        folder = Path(path)
        for index, plan in enumerate(variants.values()):
            io.save(plan, folder / f"{index}.json")
        names = json.dumps(list(variants))
        launch.run([__file__, "--rank", path, names, str(rounds), str(threads)], 1, timeout_s=7200)
        found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return {"model": model, "threads": threads, **found}


def show(found: dict[str, Any]) -> None:
    """Print one model's table."""
    from rich.console import Console
    from rich.table import Table

    from toolkit.units import format_bytes, format_seconds

    peaks, rounds = found["peak_bytes"], found["step_s"]
    about = f"{found['model']}, batch 1, {found['threads']} threads, {len(rounds)} rounds, measured"
    table = Table(title=about, title_justify="left")
    for column in ("variant", "peak", "all / peak", "layers / peak", "step", "step / layers"):
        table.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
    for name, peak in peaks.items():
        times = [times[name] for times in rounds]
        ratios = [times[name] / times[_LAYERS] for times in rounds]
        took = format_seconds(statistics.median(times)) if times else "-"
        spread = "-"
        if ratios:
            spread = f"{statistics.median(ratios):.3f} ({min(ratios):.2f}-{max(ratios):.2f})"
        table.add_row(name, format_bytes(peak), f"{peaks[_KEEP] / peak:.2f}x",
                      f"{peaks[_LAYERS] / peak:.2f}x", took, spread)  # fmt: skip
    Console(highlight=False, width=100).print(table)


def main() -> None:
    from toolkit import record

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=("gpt", "swin"), default=["gpt", "swin"])
    parser.add_argument("--parts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    found = []
    for model in options.models:
        found.append(measure(model, options.parts, options.rounds, options.threads))
        show(found[-1])
    if options.output:
        record.write(options.output, kind="plan-co-shard", version=1, body={"models": found})


if __name__ == "__main__":
    # Plans name this file's models; ranks import it too.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_HERE), os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, str(_HERE))
    if sys.argv[1:2] == ["--rank"]:
        rank_main(Path(sys.argv[2]), json.loads(sys.argv[3]), *map(int, sys.argv[4:6]))
    else:
        main()
