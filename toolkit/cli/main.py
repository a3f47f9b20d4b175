"""The `toolkit` command. Verbs are imported only when called, so that help is instant."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

import toolkit
from toolkit import log
from toolkit.cli import view
from toolkit.errors import ToolkitError

# verb -> (where its Typer app is, one line of help). A module with one command exports it as the
# app's only command; a module with several is a group.
VERBS: dict[str, tuple[str, str]] = {
    "demo": ("toolkit.cli.demo", "Plan, train, serve and retrieve on this machine, in minutes."),
    "doctor": ("toolkit.cli.doctor", "Say what this machine has and what is missing."),
    "hardware": ("toolkit.cli.hardware", "Devices and clusters: list, show, probe this machine."),
    "models": ("toolkit.cli.models", "The model zoo, and weights: list, show, get."),
    "trace": ("toolkit.cli.trace", "Trace a model into a graph of operators with their work."),
    "graph": ("toolkit.cli.graph", "Show or compare traced graphs."),
    "plan": ("toolkit.cli.plan", "Plan how a model is trained over many devices."),
    "serve": ("toolkit.cli.serve", "Serve a model over an OpenAI-compatible API."),
    "rag": ("toolkit.cli.rag", "Build an index of documents and answer from it."),
    "timeline": ("toolkit.cli.timeline", "Show a timeline, or turn it into HTML or a trace."),
}


class _Lazy(TyperGroup):
    """A group whose commands are known by name and help, and imported when invoked."""

    def __init__(self, **settings: Any) -> None:
        listed = {name: TyperCommand(name, help=text) for name, (_, text) in VERBS.items()}
        settings["commands"] = listed
        super().__init__(**settings)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(name) if name in VERBS else command, rest


def load(verb: str) -> Any:
    """Import the module behind `verb` and return its command (or group of commands)."""
    command = typer.main.get_command(importlib.import_module(VERBS[verb][0]).app)
    command.name = verb
    return command


app = typer.Typer(
    cls=_Lazy,
    name="toolkit",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: toolkit demo --quick",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"toolkit {toolkit.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log what is being done."),
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Plan, train and serve PyTorch models on a divided machine."""
    log.setup(verbose=verbose)


def main() -> None:
    """Run the command line: errors become one clear message and an exit code, never a traceback."""
    try:
        app()
    except ToolkitError as error:
        view.show_error(error, as_json="--json" in sys.argv)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        view.err.print("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        # `toolkit ... | head`: the reader has gone, which is no error.
        sys.stderr.close()
        sys.exit(0)
