"""`toolkit serve`: a model behind an OpenAI-compatible URL, what it bears, answers here."""

from __future__ import annotations

import typer

from toolkit.cli.serve import batch, bench, calibrate, generate, run, simulate

app = typer.Typer(
    help="Serve a model over an OpenAI-compatible API.",
    no_args_is_help=True,
    add_completion=False,
    epilog="Example: toolkit serve run smollm2-135m",
)
for command in (
    run.run,
    generate.generate,
    batch.batch,
    bench.bench,
    calibrate.calibrate,
    simulate.simulate,
):
    app.command()(command)
