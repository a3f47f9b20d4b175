"""`toolkit trace`: a model becomes a graph of operators, in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit.cli import view
from toolkit.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from toolkit.ir import OpGraph

app = typer.Typer(add_completion=False)

Dtype = Annotated[str, typer.Option(help="Weights and activations: float32, bfloat16, float16.")]
_DTYPES = ("float32", "bfloat16", "float16")


@app.command()
def trace(
    model: Annotated[str, typer.Argument(help="A zoo name, hf:<id or folder>, module:factory.")],
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the graph to this file.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences or images.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of each sequence.")] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="Another of the model's sizes: name=value.")
    ] = None,
    dtype: Dtype = "float32",
    inference: Annotated[
        bool, typer.Option("--inference", help="In eval mode, ending in outputs, not the loss.")
    ] = False,
    depth: Annotated[int, typer.Option(help="Levels of modules to show.")] = 1,
    as_json: view.Json = False,
) -> None:
    """Trace a model into a graph of operators, each with its work; nothing is computed.

    Weights are never made, so a model of any size traces on any machine.

    Example: toolkit trace llama3-8b --tokens 8192 --dtype bfloat16 -o llama.json
    """
    given = {"batch": batch, "tokens": tokens, **parse_sizes(size or [])}
    sizes = {name: value for name, value in given.items() if value is not None}
    graph = traced(model, sizes, dtype=dtype, inference=inference, quiet=as_json)
    digest = graph.save(output) if output else graph.digest
    from toolkit.ir import show

    found = show.rows(graph, depth=depth)
    value = {
        "name": graph.name,
        "file": str(output) if output else None,
        "digest": digest,
        "sizes": dict(graph.sizes),
        "fixed": dict(graph.fixed),
        "num_blocks": len(graph.blocks()),
        **asdict(found[0].totals),
    }

    def render() -> Any:
        from rich.console import Group

        lines: list[Any] = [show.render(graph, found)]
        lines += [f"{name} is fixed: {reason}" for name, reason in graph.fixed.items()]
        lines.append(f"wrote {output} ({digest[:12]})" if output else f"digest {digest[:12]}")
        return Group(*lines)

    view.emit(value, as_json=as_json, render=render)


def traced(
    model: str, sizes: dict[str, int], *, dtype: str, inference: bool, quiet: bool
) -> OpGraph:
    """Load and trace `model`, saying so meanwhile. Raises UsageError for a wrong name or size."""
    if dtype not in _DTYPES:
        raise unknown_name("dtype", dtype, _DTYPES)
    with view.progress(quiet=quiet) as bar:
        task = bar.add_task(f"loading {model}", total=2)
        import torch

        from toolkit import ir, models

        # One operator at a time is traced: more threads only wait for each other.
        torch.set_num_threads(1)
        found = models.load(model)
        for name in sizes:
            if name not in found.sizes:
                raise unknown_name(f"size of {model}", name, found.sizes)
        bar.update(task, advance=1, description=f"tracing {model}")
        graph = ir.trace_model(
            found, dtype=getattr(torch, dtype), training=not inference, targets=not inference,
            **sizes,
        )  # fmt: skip
        bar.update(task, advance=1)
    return graph


def parse_sizes(texts: Sequence[str]) -> dict[str, int]:
    """Read `name=value` settings, e.g. ["tokens=128"]. Raises UsageError naming a wrong one."""
    sizes = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier() or not value.isdigit() or int(value) < 1:
            raise UsageError(f"{text!r} is not a size", remedy="write name=value: tokens=128")
        sizes[name] = int(value)
    return sizes
