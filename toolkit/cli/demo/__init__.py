"""`toolkit demo`: the whole idea on this machine, with a real model and real text, in minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from toolkit.cli import view
from toolkit.cli.demo import steps
from toolkit.units import format_seconds

app = typer.Typer(add_completion=False)

# What the progress bar says, and what is done.
_STEPS: tuple[tuple[str, Callable[[steps.Setting], steps.Found]], ...] = (
    ("measure this machine", steps.probe),
    (f"trace {steps.PLANNED} and plan it for two ranks", steps.plan),
    ("train under the plan, checked against one device", steps.train),
    ("count what the ranks send", steps.verify),
    (f"trace {steps.SERVED}", steps.trace),
    ("index Python's documentation", steps.build),
    (f"serve {steps.SERVED}, chat, and answer from the index", steps.serve_and_ask),
)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Do less of each, in a minute.")] = False,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write to.")] = Path(
        "runs/demo"
    ),
    as_json: view.Json = False,
) -> None:
    """Plan, train, serve and retrieve on this machine, and show what was predicted and measured.

    Every step is a toolkit command run as you would run it. Weights are fetched once (175 MB).

    Example: toolkit demo --quick
    """
    setting = steps.Setting(output, quick)
    started_s = time.perf_counter()
    found: dict[str, steps.Found] = {}
    with view.progress(quiet=as_json) as bar:
        task = bar.add_task("get the weights", total=len(_STEPS) + 1)
        _get_weights()
        for title, step in _STEPS:
            bar.update(task, advance=1, description=title)
            found[step.__name__] = step(setting)
        bar.update(task, advance=1, description="done")
    taken_s = time.perf_counter() - started_s
    report = output / "report.html"
    _write_report(report, found)
    facts = {
        "seconds": taken_s,
        "report": str(report),
        "steps": {name: dict(step.facts) for name, step in found.items()},
    }
    view.emit(facts, as_json=as_json, render=lambda: _summary(found, report, taken_s))


def _get_weights() -> None:
    from toolkit.models import weights

    for name in (steps.SERVED, "minilm-l6"):
        weights.get(name)


def _rows(found: dict[str, steps.Found]) -> list[tuple[str, str, str, str]]:
    order = ["machine", "plan", "train", "serve", "rag"]
    rows = [row for step in found.values() for row in step.rows]
    rows.sort(key=lambda row: order.index(row.part))
    return [(row.part, row.what, row.predicted, row.measured) for row in rows]


def _write_report(path: Path, found: dict[str, steps.Found]) -> None:
    from toolkit.timeline import html

    said = found["serve_and_ask"].facts
    tables = [
        html.Table(
            "Predicted and measured on this machine, in this run",
            ("part", "what", "predicted>", "measured>"),
            _rows(found),
        ),
        html.Table(
            f"What {steps.SERVED} said",
            ("asked", "answer"),
            [
                (said["chat"]["question"], said["chat"]["text"]),
                (said["answer"]["question"], said["answer"]["text"]),
            ],
        ),
        html.Table(
            "Passages the second answer rests on, and how it cites them",
            ("no", "cited", "passage", "where"),
            _sources(said["answer"]),
        ),
    ]
    timelines = [timeline for step in found.values() for timeline in step.timelines]
    html.write(timelines, path, title="toolkit demo", tables=tables)


def _sources(answer: dict[str, Any]) -> list[tuple[int, str, str, str]]:
    rows = []
    for number, hit in enumerate(answer["hits"], start=1):
        how = {each["how"] for each in answer["citations"] if each["number"] == number}
        where = f"{hit['source']}:{hit['start_line']}-{hit['end_line']}"
        rows.append((number, ", ".join(sorted(how)) or "not cited", hit["title"], where))
    return rows


def _summary(found: dict[str, steps.Found], report: Path, taken_s: float) -> Group:
    said = found["serve_and_ask"].facts
    return Group(
        Text(f"{steps.SERVED} was asked: {said['chat']['question']}", style="bold"),
        Text(said["chat"]["text"] + "\n"),
        Text(f"From the index: {said['answer']['question']}", style="bold"),
        Text(said["answer"]["text"] + "\n"),
        view.table("Sources", ("no>", "cited", "passage", "where"), _sources(said["answer"])),
        view.table(
            "Predicted and measured", ("part", "what", "predicted>", "measured>"), _rows(found)
        ),
        Text(f"{format_seconds(taken_s)}; timelines of this run: {report}"),
    )
