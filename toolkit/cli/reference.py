"""Writes the command-line reference: `python -m toolkit.cli.reference FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import typer
from typer.cli import get_docs_for_click

from toolkit import record
from toolkit.cli.main import VERBS, load

HEADER = """# Command-line reference

Written by `make docs` from the commands themselves; do not edit by hand. Every command takes
`--json` (one JSON object on stdout; errors as JSON on stderr) and exits with 0 when it did what was
asked, 1 on failure, 2 on wrong usage, 3 when nothing satisfies the request.

"""


def render() -> str:
    """Return the reference of every verb as Markdown."""
    pages = []
    for verb in VERBS:
        command = load(verb)
        context = typer.Context(command, info_name=f"toolkit {verb}")
        pages.append(
            get_docs_for_click(obj=command, ctx=context, name=f"toolkit {verb}", indent=1).strip()
        )
    return HEADER + "\n\n".join(pages) + "\n"


if __name__ == "__main__":
    record.write_bytes(Path(sys.argv[1]) / "cli.md", render().encode())
