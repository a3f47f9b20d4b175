"""Tracing a plan's model again and simulating the plan: what several commands begin with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolkit.cli import view

if TYPE_CHECKING:
    from toolkit.cost.calibration import Calibration
    from toolkit.hardware import Cluster
    from toolkit.plan.plan import Plan
    from toolkit.plan.predict.simulate import Run
    from toolkit.plan.subject import Subject
    from toolkit.timeline import Timeline

PlanFile = Annotated[Path, typer.Argument(help="A plan written by `toolkit plan`.")]
ClusterName = Annotated[
    str | None,
    typer.Option("--cluster", help="Predict on this cluster instead of the plan's own."),
]

CalibrationFile = Annotated[
    Path | None,
    typer.Option("--calibration", help="Predict with this file of `toolkit plan calibrate`."),
]


def calibration(path: Path | None) -> Calibration | None:
    """Read a calibration, if one is named."""
    from toolkit.cost.calibration import Calibration

    return Calibration.load(path) if path is not None else None


def trace(plan: Plan, cluster: str | None, *, quiet: bool) -> tuple[Subject, Cluster]:
    """Return the plan's model, traced again and found to be the same, and where it would run."""
    from toolkit.hardware import find_cluster
    from toolkit.plan import predict, subject

    where = find_cluster(cluster or plan.provenance.cluster)
    predict.check_fits(plan.num_ranks, where)
    with view.progress(quiet=quiet) as bar:
        bar.add_task(f"trace {plan.provenance.model}", total=None)
        traced = subject.of(plan)
        subject.check_same(traced, plan)
    return traced, where


def simulate(
    plan: Plan, cluster: str | None, calibrated: Path | None = None, *, quiet: bool
) -> Run:
    """Return one simulated step of the plan."""
    from toolkit.plan import predict

    measured = calibration(calibrated)
    return predict.simulated(plan, *trace(plan, cluster, quiet=quiet), calibration=measured)


def timeline(run: Run, plan: Plan) -> Timeline:
    """Return a simulated step as predicted spans."""
    return run.timeline(f"{plan.strategy}: one step, predicted")
