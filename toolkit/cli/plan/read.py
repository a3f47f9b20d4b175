"""`toolkit plan show`, `explain`, `diff`, `simulate`: looking at plans."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group

from toolkit.cli import view
from toolkit.cli.plan import again, picture
from toolkit.cli.plan.again import CalibrationFile, ClusterName, PlanFile
from toolkit.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from toolkit.plan.explain import Explanation
    from toolkit.plan.plan import Plan

_SHOWN = 16  # positions of a pipeline
_WIDEST = 60  # characters of a side of a difference


def library(as_json: view.Json = False) -> None:
    """List the plans of the library: what `make --strategy` takes.

    Example: toolkit plan library
    """
    from toolkit.plan import library as plans

    found = {name: plans.describe(name) for name in plans.STRATEGIES}
    view.emit(
        found,
        as_json=as_json,
        render=lambda: view.table("Plans", ["strategy", "what"], [*found.items()]),
    )


def show(path: PlanFile, cluster: ClusterName = None, as_json: view.Json = False) -> None:
    """Show a plan: what is split how, what is predicted, and the predicted step in time.

    Example: toolkit plan show plan.json
    """
    from toolkit.plan import io
    from toolkit.timeline import terminal

    plan = io.load(path)
    if as_json:
        view.emit(io.to_body(plan), as_json=True, render=lambda: None)
        return
    run = again.simulate(plan, cluster, quiet=False)
    view.emit(
        {},
        as_json=False,
        render=lambda: Group(
            *picture.summary(plan),
            picture.order(plan),
            "",
            terminal.render(again.timeline(run, plan)),
        ),
    )


def explain(
    path: PlanFile,
    cluster: ClusterName = None,
    calibration: CalibrationFile = None,
    as_json: view.Json = False,
) -> None:
    """Say why a plan is what it is: what binds, what was next best, what would help.

    Example: toolkit plan explain plan.json
    """
    from toolkit.plan import explain as explaining
    from toolkit.plan import io

    plan = io.load(path)
    measured = again.calibration(calibration)
    traced, where = again.trace(plan, cluster, quiet=as_json)
    found = explaining.explain(plan, traced, where, calibration=measured)
    view.emit(asdict(found), as_json=as_json, render=lambda: Group(*_explained(plan, found)))


def _explained(plan: Plan, found: Explanation) -> list[Any]:
    step_s = found.prediction.step_s

    def against(other_s: float | None) -> str:
        return f"{other_s / step_s - 1:+.1%}" if other_s is not None else ""

    spent = [
        [one.position, format_seconds(one.compute_s), format_seconds(one.exposed_s),
         format_seconds(one.waiting_s)]
        for one in found.spent[:_SHOWN]
    ]  # fmt: skip
    rows = [["this plan", format_seconds(step_s), format_bytes(found.prediction.peak_bytes), ""]]
    for what, other in (("runner-up", found.runner_up), ("faster, no room", found.fastest_unfit)):
        if other is not None and other.step_s is not None:
            size = format_bytes(other.peak_bytes) if other.peak_bytes is not None else ""
            rows.append(
                [f"{what}: {other.description}", format_seconds(other.step_s), size,
                 against(other.step_s)]
            )  # fmt: skip
    changes = [
        [change.what, format_seconds(change.step_s), against(change.step_s), change.instead]
        for change in found.changes
    ]
    limit = format_bytes(found.prediction.memory_limit_bytes)
    return [
        f"{plan.strategy} is bound by {found.binding}",
        *([found.offload] if found.offload else []),
        "",
        view.table(
            "Where the step goes, predicted",
            ["position>", "computing>", "communicating alone>", "waiting>"],
            spent,
        ),
        view.table(
            f"Beside it, predicted (a rank may hold {limit})",
            ["plan", "step>", "memory>", ""],
            rows,
        ),
        view.table(
            "What more would change, predicted", ["with", "step>", "", "then take"], changes
        ),
    ]


def diff(
    first: PlanFile,
    second: Annotated[Path, typer.Argument(help="The plan to compare with.")],
    as_json: view.Json = False,
) -> None:
    """Compare two plans, module by module. Exits with 1 when they differ.

    Example: toolkit plan diff plan.json other.json
    """
    from toolkit.plan import diff as comparing
    from toolkit.plan import io

    found = comparing.diff(io.load(first), io.load(second))
    rows = [[change.what, _side(change.first), _side(change.second)] for change in found]
    view.emit(
        {"equal": not found, "changes": [asdict(change) for change in found]},
        as_json=as_json,
        render=lambda: (
            view.table("What differs", ["what", str(first), str(second)], rows)
            if found
            else f"{first} and {second} are the same plan"
        ),
    )
    if found:
        raise typer.Exit(1)


def _side(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= _WIDEST else text[:_WIDEST] + " ..."


def simulate(
    path: PlanFile,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The timeline file to write.")
    ] = Path("timeline.json"),
    cluster: ClusterName = None,
    calibration: CalibrationFile = None,
    as_json: view.Json = False,
) -> None:
    """Simulate one step of a plan and write its predicted timeline.

    Example: toolkit plan simulate plan.json -o timeline.json
    """
    from toolkit.plan import io
    from toolkit.timeline import files

    plan = io.load(path)
    run = again.simulate(plan, cluster, calibration, quiet=as_json)
    made = again.timeline(run, plan)
    files.save(made, output)
    facts = {
        "path": str(output),
        "source": "predicted",
        "step_s": run.step_s,
        "bubble": run.bubble,
        "spans": len(made.spans),
    }
    view.emit(
        facts,
        as_json=as_json,
        render=lambda: (
            f"predicted step {format_seconds(run.step_s)}, bubble {run.bubble:.1%}; wrote "
            f"{len(made.spans)} spans to {output} (look at it: toolkit timeline show {output})"
        ),
    )
