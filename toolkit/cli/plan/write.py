"""`toolkit plan export`: a plan as another tool's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group

from toolkit.cli import view
from toolkit.cli.plan.again import PlanFile


def export(
    path: PlanFile,
    form: Annotated[str, typer.Option("--to", help="torchtitan or accelerate.")] = "torchtitan",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to write files into.")
    ] = Path(),
    as_json: view.Json = False,
) -> None:
    """Write a plan as a torchtitan or accelerate configuration, where that tool can express it.

    The files are for those tools; running them is not checked here.

    Example: toolkit plan export plan.json --to torchtitan -o exported
    """
    from toolkit import record
    from toolkit.plan import export as exporting
    from toolkit.plan import io, subject

    plan = io.load(path)
    exporting.check(plan, form)
    with view.progress(quiet=as_json) as bar:
        bar.add_task(f"trace {plan.provenance.model}", total=None)
        classes = subject.of(plan).graph.modules
    made = exporting.export(plan, form, classes)
    output.mkdir(parents=True, exist_ok=True)
    for name, text in made.files.items():
        record.write_bytes(output / name, text.encode())
    facts = {"files": [str(output / name) for name in made.files], "command": made.command}
    view.emit(
        facts,
        as_json=as_json,
        render=lambda: Group(*(f"wrote {name}" for name in facts["files"]), made.command),
    )
