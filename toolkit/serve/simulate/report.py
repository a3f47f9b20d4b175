"""What a simulation found: the figures of `serve bench`, marked simulated, and the split's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from toolkit.errors import require
from toolkit.serve.bench import report
from toolkit.serve.bench.sample import Sample
from toolkit.serve.engine import Engine
from toolkit.serve.request import Phase
from toolkit.serve.split.controller import Dynamic
from toolkit.serve.split.engine import DividedEngine
from toolkit.serve.split.predictor import Predictor


def summary(samples: Sequence[Sample], engine: Engine, promise: report.Promise) -> dict[str, Any]:
    """Return one simulated run's figures; seconds are virtual.

    Beside those of a measured load: `normalised_s`, a request's latency over its output tokens
    (Nexus's metric), preemptions, and `split` where the engine has a controller.
    """
    found = report.summary(samples, promise) | {"source": "simulated"}
    found["normalised_s"] = report.spread(
        [sample.e2e_s / sample.output_tokens for sample in samples]
    )
    found["num_preemptions"] = engine.scheduler.num_preemptions
    found["split"] = _split(engine) if isinstance(engine, DividedEngine) else None
    return found


def _split(engine: DividedEngine) -> dict[str, Any]:
    controller = engine.controller
    found: dict[str, Any] = {"num_steps": dict(engine.num_steps)}
    if isinstance(controller, Predictor):
        found["prediction_errors"] = {
            _kind(kind): asdict(correction.errors)
            for kind, correction in controller.corrections.items()
            if correction.errors is not None
        }
    if isinstance(controller, Dynamic):
        found |= {
            "num_changes": controller.num_changes,
            "num_evaluations": controller.num_evaluations,
            "last_layout": str(controller.decision.layout),
            "last_reason": controller.decision.reason,
        }
    return found


def _kind(phase: Phase | None) -> str:
    return "mixed" if phase is None else phase.value


def draw(runs: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Write latency against rate as a picture, a line for each system: `runs` have `rate`."""
    figures = require("matplotlib.figure", extra="plots")
    figure = figures.Figure(figsize=(12, 3.8), layout="constrained")
    panels = figure.subplots(1, 3)
    names = list(dict.fromkeys(run["system"] for run in runs))
    for panel, key, name, text in (
        (panels[0], "ttft_s", "p95", "time to first token, p95 [s]"),
        (panels[1], "tbt_s", "p99", "time between tokens, p99 [s]"),
        (panels[2], "normalised_s", "mean", "latency / output tokens, mean [s]"),
    ):
        for system in names:
            own = [run for run in runs if run["system"] == system and run["rate"] is not None]
            values = [(run[key] or {}).get(name) for run in own]
            panel.plot([run["rate"] for run in own], values, "o-", label=system, markersize=3)
        panel.set(xlabel="requests sent a second", ylabel=text, yscale="log")
    panels[0].legend(fontsize="small")
    figure.suptitle(f"{title} (simulated)")
    figure.savefig(path, dpi=130)
