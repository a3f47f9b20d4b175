#!/usr/bin/env python
"""Train a planned model.

    toolkit plan make gpt-tiny --strategy auto --cluster cpux2 -o plan.json
    torchrun --nproc-per-node 2 recipes/train.py --plan plan.json --steps 50

What is trained, and how it is divided, is in the plan. Language models read real text: by default
what every CPython carries (its language reference and standard library), as bytes; `--dataset`
takes a file, a folder of text files, or any Hugging Face dataset with a `text` column. Swin and
Evoformer are trained on synthetic images and alignments, which have something to learn in them and
say nothing about the real tasks. Copy this file and change it: everything it uses is public.

A run that is killed goes on where its last checkpoint was, under the same plan or another:

    torchrun --nproc-per-node 2 --max-restarts 3 recipes/train.py --plan plan.json --checkpoint run

Hugging Face `datasets` reads the data; `accelerate` is not used: its wrapping would divide the
model a second time, and its loaders would shard batches that here are a function of (seed, step),
so that a run resumed under another plan sees the same text.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from toolkit import record
from toolkit.errors import ToolkitError, UsageError
from toolkit.plan import checkpoint, io, parity, runtime, samples
from toolkit.plan.lower.lowered import Lowered
from toolkit.plan.plan import Plan
from toolkit.plan.runtime import Session
from toolkit.plan.samples import Samples
from toolkit.timeline import files
from toolkit.units import format_bytes, format_seconds

console = Console(stderr=True, highlight=False)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=Path, required=True, help="from `toolkit plan make`")
    parser.add_argument("--steps", type=int, default=50, help="the step to train up to")
    parser.add_argument("--dataset", help="a file, a folder of text files, or a dataset's name")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the samples")
    parser.add_argument("--checkpoint", type=Path, help="folder; resumes from its newest")
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--check-parity", type=int, default=0, metavar="N",
                        help="compare loss and gradients with one device for N steps")  # fmt: skip
    parser.add_argument("--timeline", type=Path, help="write what was measured in the last step")
    parser.add_argument("--json", type=Path, help="write the metrics to this file")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    plan = io.load(options.plan)
    data = samples.of(plan, options.dataset)
    with runtime.session() as here:
        metrics = train(plan, data, here, options)
    if here.rank == 0:
        report(plan, metrics)
        if options.json:
            record.write(options.json, kind="training-metrics", version=1, body=metrics)


def train(plan: Plan, data: Samples, here: Session, options: argparse.Namespace) -> dict[str, Any]:
    """Train up to step `options.steps`; return the metrics (the same on every rank)."""
    lowered = runtime.prepare(plan, here)
    optimizer = adamw(lowered, options)
    about = {"model": plan.provenance.model, "text": data.digest, "seed": options.seed,
             "batch": plan.provenance.sizes["batch"]}  # fmt: skip
    first = 0
    if options.checkpoint and (found := checkpoint.latest(options.checkpoint)):
        first = checkpoint.load(found, lowered, optimizer, about)
        if here.rank == 0:
            console.print(f"resumed from {found}")
    if first >= options.steps:
        raise UsageError(
            f"the checkpoint is at step {first} already", remedy=f"use --steps above {first}"
        )
    checks: list[parity.Parity] = []
    losses: list[float] = []
    seconds: list[float] = []
    with progress(here) as bar:
        task = bar.add_task("train", total=options.steps, completed=first, loss="")
        for step in range(first, options.steps):
            made = data.batch(step, batch=plan.provenance.sizes["batch"], seed=options.seed)
            batch = {name: value.to(here.device) for name, value in made.items()}
            checked = step - first < options.check_parity
            want = parity.one_device(plan, here, lowered, batch) if checked else None
            runtime.synchronise(lowered)
            started_s = time.perf_counter()
            lowered.zero_gradients()
            loss = lowered.step(batch)
            if want:
                checks.append(parity.compare(lowered, loss, want))
            with lowered.recorder.span("update", "optimizer"):
                optimizer.step()
            lowered.after_update()
            if not want:
                seconds.append(time.perf_counter() - started_s)
            losses.append(lowered.global_loss(loss))
            bar.update(task, advance=1, loss=f"loss {losses[-1]:.4f}")
            done = step + 1
            if options.checkpoint and (
                done % options.checkpoint_every == 0 or done == options.steps
            ):
                checkpoint.save(options.checkpoint, done, lowered, optimizer, about)
    if options.timeline:
        measured = runtime.timeline(lowered, f"{plan.strategy}: one step, measured")
        if here.rank == 0:
            files.save(measured, options.timeline)
    failed = [check for check in checks if not check.holds]
    if failed:
        raise ToolkitError(
            f"loss or gradients differ from one device: {failed[0].worst_gradient} by "
            f"{failed[0].gradient_error:.2g}, loss by {failed[0].loss_error:.2g}, and "
            f"{failed[0].tolerance:g} is allowed"
        )
    return {
        "model": plan.provenance.model,
        "strategy": plan.strategy,
        "rung": lowered.rung,
        "ranks": here.num_ranks,
        "data": data.source,
        "first_step": first,
        "losses": losses,
        "measured_step_s": statistics.median(seconds[1:] or seconds) if seconds else None,
        "predicted_step_s": plan.prediction.step_s if plan.prediction else None,
        "peak_memory_bytes": peak_memory(here),
        "predicted_memory_bytes": plan.prediction.peak_bytes if plan.prediction else None,
        "parity": [{**asdict(check), "holds": check.holds} for check in checks],
    }


def adamw(lowered: Lowered, options: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW over what this rank updates."""
    return torch.optim.AdamW(
        runtime.optimizer_groups(lowered),
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
        # One pass over memory: on the host, as predicted.
        fused=lowered.plan.offload != "none" or None,
    )


def progress(here: Session) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"), TimeElapsedColumn(),
        console=console, disable=here.rank != 0,
    )  # fmt: skip


def peak_memory(here: Session) -> int:
    """Bytes at the fullest: of the GPU's allocator, else of this process with Python and torch."""
    if here.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(plan: Plan, metrics: dict[str, Any]) -> None:
    """Print what was predicted beside what was measured."""
    losses = metrics["losses"]
    table = Table(title=f"{metrics['strategy']} on {metrics['ranks']} ranks", title_justify="left")
    for column in ("what", "predicted", "measured"):
        table.add_column(column, justify="left" if column == "what" else "right")
    predicted, measured = metrics["predicted_step_s"], metrics["measured_step_s"]
    table.add_row("loss, first and last step", "", f"{losses[0]:.4f}, {losses[-1]:.4f}")
    table.add_row(
        "step time",
        format_seconds(predicted) if predicted else "",
        format_seconds(measured) if measured else "every step was checked, none was timed",
    )
    table.add_row(
        "memory of the fullest rank (measured: the whole process of rank 0)",
        format_bytes(plan.prediction.peak_bytes) if plan.prediction else "",
        format_bytes(metrics["peak_memory_bytes"]),
    )
    for step, check in enumerate(metrics["parity"], start=metrics["first_step"]):
        table.add_row(
            f"step {step} against one device: worst of {check['num_gradients']} gradients, loss",
            f"<= {check['tolerance']:g}",
            f"{check['gradient_error']:.2g}, {check['loss_error']:.2g}",
        )
    Console(highlight=False).print(table)
    Console(highlight=False).print(f"trained on {metrics['data']}")


if __name__ == "__main__":
    try:
        main()
    except ToolkitError as error:
        if os.environ.get("RANK", "0") == "0":
            console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)
    runtime.leave()
