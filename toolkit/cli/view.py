"""Everything the command line shows: tables, progress bars, JSON and errors."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, cast

import typer
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.protocol import is_renderable
from rich.table import Table
from rich.text import Text

from toolkit.errors import ToolkitError

# Every command takes `as_json: Json = False`.
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]

# Without a terminal rich would wrap at 80, which no table of ours reads well at.
_WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120

out = Console(highlight=False, width=_WIDTH)
err = Console(stderr=True, highlight=False)


def emit(value: Any, *, as_json: bool, render: Callable[[], Any]) -> None:
    """Print `value` as JSON, or whatever `render()` returns (a rich renderable) for people."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")
    else:
        out.print(render())


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Return a table; a column named with a trailing ">" is right-aligned (numbers).

    Text is shown as it is, square brackets included; a cell may also be any rich renderable.
    """
    made = Table(title=Text(title), title_justify="left", header_style="bold", title_style="bold")
    for column in columns:
        made.add_column(
            column.removesuffix(">"),
            justify="right" if column.endswith(">") else "left",
            overflow="fold",
        )
    for row in rows:
        made.add_row(*(_cell(cell) for cell in row))
    return made


def _cell(cell: Any) -> RenderableType:
    if is_renderable(cell) and not isinstance(cell, str):
        return cast("RenderableType", cell)
    return Text(str(cell))


class _Count(MofNCompleteColumn):
    """Done of total; nothing where the total is not known."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total is not None else Text()


@contextlib.contextmanager
def progress(*, quiet: bool = False) -> Iterator[Progress]:
    """Yield a progress bar on stderr that says what is being done; silent with `quiet`."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        _Count(),
        TimeElapsedColumn(),
        console=err,
        disable=quiet,
    )
    with bar:
        yield bar


def show_error(error: ToolkitError, *, as_json: bool) -> None:
    """Print one error: a sentence and its remedy, or the same as JSON."""
    if as_json:
        body = {"kind": error.kind, "message": error.message, "remedy": error.remedy}
        sys.stderr.write(json.dumps({"error": body}) + "\n")
        return
    err.print(f"[bold red]error:[/] {_plain(error.message)}", soft_wrap=True)
    if error.remedy:
        err.print(f"[bold]remedy:[/] {_plain(error.remedy)}", soft_wrap=True)


def _plain(text: str) -> str:
    """Keep square brackets in messages (extras, shapes) from being read as markup."""
    return text.replace("[", r"\[")
