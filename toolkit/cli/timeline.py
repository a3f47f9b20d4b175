"""`toolkit timeline`: look at a timeline, or turn it into a page or a trace."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group

from toolkit import record
from toolkit.cli import view
from toolkit.errors import UsageError
from toolkit.timeline import Timeline, files, html, perfetto, summary, terminal

app = typer.Typer(
    help="Show a timeline, or turn it into HTML or a trace.",
    no_args_is_help=True,
    add_completion=False,
    epilog="Example: toolkit timeline show runs/demo/timeline.json",
)

Files = Annotated[list[Path], typer.Argument(help="Timelines written by toolkit.")]
Merge = Annotated[
    bool,
    typer.Option("--merge", help="Lay all of them on one axis: what was predicted by what ran."),
]
FORMATS = {
    ".html": "a page to zoom and search, self-contained",
    ".json.gz": "a Chrome trace, for ui.perfetto.dev",
    ".json": "the same trace, not compressed",
    ".txt": "the chart that `show` prints, without colour",
}


@app.command()
def show(
    paths: Files,
    merge: Merge = False,
    as_json: view.Json = False,
) -> None:
    """Draw timelines in the terminal, with busy time and utilisation by track.

    Example: toolkit timeline show runs/demo/timeline.json
    """
    timelines = _load(paths, merge=merge)

    def render() -> Group:
        parts: list[Any] = []
        for timeline in timelines:
            parts += [
                terminal.render(timeline),
                "",
                _table(timeline),
            ]
        return Group(*parts)

    facts = {"timelines": [_facts(timeline) for timeline in timelines]}
    view.emit(facts, as_json=as_json, render=render)


@app.command()
def export(
    paths: Files,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="What to write: " + ", ".join(FORMATS) + "."),
    ],
    merge: Merge = False,
    as_json: view.Json = False,
) -> None:
    """Write timelines in the format the output's suffix names: .html, .json.gz, .json or .txt.

    Example: toolkit timeline export plan.json run.json --merge -o compare.html
    """
    suffix = next((known for known in FORMATS if output.name.endswith(known)), None)
    if suffix is None:
        raise UsageError(
            f"cannot tell a format from the name {output.name!r}",
            remedy="end it in " + ", ".join(f"{key} ({what})" for key, what in FORMATS.items()),
        )
    if output.resolve() in {path.resolve() for path in paths}:
        raise UsageError(
            f"{output} is one of the timelines being read", remedy="give another name to -o"
        )
    timelines = _load(paths, merge=merge)
    if suffix == ".html":
        html.write(timelines, output)
    elif suffix == ".txt":
        record.write_bytes(output, _text(timelines).encode())
    elif len(timelines) > 1:
        raise UsageError(
            f"a trace holds one timeline, not {len(timelines)}",
            remedy="add --merge, or export them one by one",
        )
    else:
        perfetto.write(timelines[0], output)
    num_spans = sum(len(timeline.spans) for timeline in timelines)
    facts = {
        "path": str(output),
        "format": suffix.removeprefix("."),
        "num_bytes": output.stat().st_size,
        "num_spans": num_spans,
    }
    view.emit(facts, as_json=as_json, render=lambda: f"{num_spans:,} spans written to {output}")


def _load(paths: list[Path], *, merge: bool) -> list[Timeline]:
    timelines = [files.load(path) for path in paths]
    if not merge:
        return timelines
    title = " and ".join(dict.fromkeys(timeline.title for timeline in timelines))
    # Each file counts from its own clock; laid together, each source starts at 0.
    return [reduce(Timeline.merged, timelines).aligned(title=title)]


def _table(timeline: Timeline) -> Any:
    headers, rows = summary.table(summary.tracks(timeline))
    # A track may be called anything, square brackets included.
    return view.table("Time by track", headers, rows)


def _text(timelines: list[Timeline]) -> str:
    console = Console(width=160, color_system=None)
    with console.capture() as captured:
        for timeline in timelines:
            console.print(terminal.render(timeline))
    return captured.get()


def _facts(timeline: Timeline) -> dict[str, Any]:
    rows = summary.tracks(timeline)
    return {
        "title": timeline.title,
        "num_spans": len(timeline.spans),
        "duration_s": summary.durations_s(timeline),
        "measured_over_expected": summary.against(timeline),
        "tracks": [vars(row) for row in rows],
        "counters": [counter.name for counter in timeline.paired_counters()],
    }
