"""`toolkit plan`: plan how a model is trained over many devices, and check what was planned."""

from __future__ import annotations

import typer

from toolkit.cli.plan import calibrate, make, read, search, verify, write

app = typer.Typer(
    help="Plan how a model is trained over many devices.",
    no_args_is_help=True,
    add_completion=False,
    epilog="Example: toolkit plan search gpt-tiny --cluster cpux2 -o plan.json",
)
for command in (
    search.search,
    make.make,
    read.library,
    read.show,
    read.explain,
    read.diff,
    read.simulate,
    verify.verify,
    calibrate.calibrate,
    write.export,
):
    app.command()(command)
