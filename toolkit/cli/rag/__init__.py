"""`toolkit rag`: an index of documents, kept up to date, searched, and answered from."""

from __future__ import annotations

import typer

from toolkit.cli.rag import ask, bench, index, measure, serve, simulate

app = typer.Typer(
    help="Build an index of documents and answer from it.",
    no_args_is_help=True,
    add_completion=False,
)
for command in (
    index.build, index.add, index.delete, index.compact, ask.search, ask.ask, bench.bench,
):  # fmt: skip
    app.command()(command)
app.command()(serve.serve)
app.command()(measure.advise)
app.command()(simulate.simulate)
app.command(name="eval")(measure.evaluate)
