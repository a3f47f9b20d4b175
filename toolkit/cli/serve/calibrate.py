"""`toolkit serve calibrate`: the cost model of divided serving fitted to this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit.cli import view
from toolkit.cli.serve.options import (
    BlockSize,
    MaxBatch,
    MaxContext,
    Model,
    Quantize,
    StepTokens,
    Threads,
    divided,
    settings,
)
from toolkit.errors import InfeasibleError
from toolkit.units import format_seconds

if TYPE_CHECKING:
    from toolkit.serve.split.calibration import Point, ServeCalibration


def calibrate(
    model: Model,
    *,
    max_batch: MaxBatch = 32,
    step_tokens: StepTokens = 256,
    block_size: BlockSize = 16,
    max_context: MaxContext = 2048,
    threads: Threads = None,
    quantize: Quantize = "none",
    seed: Annotated[int, typer.Option(help="Of the order, and of what is held out.")] = 0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file; default in the cache.")
    ] = None,
    as_json: view.Json = False,
) -> None:
    """Measure steps of a model on shares of this machine's cores, alone and side by side, and fit
    the cost model that `serve run --split auto` and `serve simulate --calibration` predict with.

    Takes a minute or so, in which nothing else should run. A quarter of the steps is held out of
    the fit and judges it; the errors are reported.

    Example: toolkit serve calibrate smollm2-135m --quantize int8
    """
    chosen = settings(
        threads=threads,
        kv_memory=None,
        max_batch=max_batch,
        step_tokens=step_tokens,
        block_size=block_size,
        max_context=max_context,
        pin=True,
        quantize=quantize,
        split=divided("auto"),
    )
    from toolkit.hardware.measured import processor_name
    from toolkit.serve import divide
    from toolkit.serve.assemble import assemble
    from toolkit.serve.calibrate import Bench
    from toolkit.serve.executor.phases import PhasedCpuExecutor
    from toolkit.serve.split import calibration

    with view.progress(quiet=as_json) as bar:
        task = bar.add_task(f"loading {model}", total=None)
        assembly = assemble(model, chosen)
        executor = assembly.executor
        if not isinstance(executor, PhasedCpuExecutor):
            raise InfeasibleError(f"{model} is not served on cores that can be divided")
        executor.start()
        try:
            limits = assembly.engine.scheduler.config
            bench = Bench(
                executor,
                max_batch=limits.max_batch,
                step_tokens=limits.step_tokens,
                max_context=limits.max_context,
            )
            bar.update(task, description="measuring", total=len(bench.trials()))
            points = bench.run(lambda: bar.advance(task), seed=seed)
        finally:
            executor.close()
    work = divide.work_of(executor.decoder, model)
    device = divide.device_of(executor.threads)
    found = calibration.fit(points, work, device, processor_name(), seed=seed)
    path = output or calibration.default_path(model, quantize, executor.threads)
    digest = found.save(path)
    body = {
        "model": model,
        "path": str(path),
        "digest": digest,
        "processor": found.processor,
        "num_units": device.num_units,
        "num_points": len(points),
        "bandwidth": found.bandwidth,
        "errors": {name: asdict(each) for name, each in found.errors.items()},
        "points": [_point(each, found) for each in points],
    }
    view.emit(body, as_json=as_json, render=lambda: _shown(body))


def _point(point: Point, found: ServeCalibration) -> dict[str, Any]:
    from toolkit.serve.split.calibration import predicted_s

    return asdict(point) | {
        "kind": point.name,
        "predicted_s": predicted_s(found.cost_model(), point),
    }


def _shown(body: dict[str, Any]) -> Any:
    from rich.console import Group

    def cells(errors: dict[str, Any] | None) -> list[Any]:
        if errors is None:
            return [0, "-", "-", "-"]
        shown = (f"{100 * errors[name]:.1f} %" for name in ("median", "p90", "maximum"))
        return [errors["num_samples"], *shown]

    rows = [
        [name, *cells(each["fitted"]), *cells(each["held_out"])]
        for name, each in sorted(body["errors"].items())
    ]
    columns = ["steps", "fitted>", "median>", "p90>", "most>"]
    columns += ["held out>", "median>", "p90>", "most>"]
    slowest = max(point["seconds"] for point in body["points"])
    title = f"{body['model']} on {body['processor']}: predicted against measured seconds of a step"
    return Group(
        view.table(title, columns, rows),
        f"{body['num_points']} steps of up to {format_seconds(slowest)}, measured on 1 to "
        f"{body['num_units']} cores; written to {body['path']}",
    )
