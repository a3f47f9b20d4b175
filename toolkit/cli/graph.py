"""`toolkit graph`: look at a traced graph, or at how two differ."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit import units
from toolkit.cli import view
from toolkit.cli.trace import Dtype, parse_sizes, traced

if TYPE_CHECKING:
    from toolkit.ir import OpGraph
    from toolkit.ir.diff import Change

app = typer.Typer(help="Show or compare traced graphs.", no_args_is_help=True, add_completion=False)

At = Annotated[
    list[str] | None,
    typer.Option(help="Evaluate at another size, without tracing again: tokens=128 (repeatable)."),
]


@app.command()
def show(
    graph: Annotated[str, typer.Argument(help="A graph file, or a model to trace.")],
    depth: Annotated[int | None, typer.Option(help="Levels of modules; all when left out.")] = None,
    at: At = None,
    dtype: Dtype = "float32",
    as_json: view.Json = False,
) -> None:
    """Show what a graph costs, by module, repeated blocks folded.

    FLOPs, bytes moved and activations saved are predicted by formula. `context` (keys attended to)
    may differ from `tokens` (new tokens): --at tokens=1 --at context=4096 is a step of decoding.

    Example: toolkit graph show llama.json --depth 3 --at batch=8 --at tokens=1024
    """
    found = opened(graph, at or [], dtype=dtype, quiet=as_json)
    from toolkit.ir import show as tree

    rows = tree.rows(found, depth=depth)
    value = {
        "name": found.name,
        "digest": found.digest,
        "sizes": dict(found.sizes),
        "modules": [{"path": row.path, "module": row.module, "times": row.times,
                     **asdict(row.totals)} for row in rows],
    }  # fmt: skip
    view.emit(value, as_json=as_json, render=lambda: tree.render(found, rows))


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="A graph file, or a model to trace.")],
    b: Annotated[str, typer.Argument(help="What to compare it with.")],
    at: At = None,
    dtype: Dtype = "float32",
    as_json: view.Json = False,
) -> None:
    """Compare two graphs by module: operators, parameters, FLOPs and bytes.

    Like diff(1), exits with 0 when they compute the same and 1 when they differ; 2 is an error.

    Example: toolkit graph diff before.json after.json
    """
    first = opened(a, at or [], dtype=dtype, quiet=as_json)
    second = opened(b, at or [], dtype=dtype, quiet=as_json)
    from toolkit.ir import diff as differences

    changes = differences.compare(first, second)
    value = {
        "equal": not changes,
        "a": first.digest,
        "b": second.digest,
        "changes": [{"path": change.path, **asdict(change)} for change in changes],
    }
    view.emit(value, as_json=as_json, render=lambda: _render(a, b, changes))
    if changes:
        raise typer.Exit(1)


def opened(graph: str, at: list[str], *, dtype: str, quiet: bool) -> OpGraph:
    """Read the graph file, or trace the model, that `graph` names, evaluated at the sizes given."""
    sizes = parse_sizes(at)
    path = Path(graph)
    if path.suffix == ".json" or path.is_file():
        from toolkit.ir import OpGraph

        found = OpGraph.load(path)
    else:
        found = traced(graph, {}, dtype=dtype, inference="context" in sizes, quiet=quiet)
    return found.at(**sizes) if sizes else found


def _render(a: str, b: str, changes: tuple[Change, ...]) -> Any:
    if not changes:
        return f"{a} and {b} compute the same"
    rows = []
    for change in changes:
        lines = [f"+ {line}" for line in change.added] + [f"- {line}" for line in change.removed]
        times = f" ({len(change.paths)} modules)" if len(change.paths) > 1 else ""
        rows.append([
            (change.path or "(the model itself)") + times,
            "\n".join(lines),
            _signed(change.num_parameters, units.format_count),
            _signed(change.forward_flops, units.format_flops),
            _signed(change.backward_flops, units.format_flops),
            _signed(change.saved_bytes, units.format_bytes),
        ])  # fmt: skip
    return view.table(
        f"{b} compared with {a}; amounts are for one module, predicted",
        ["module", "operators and parameters", "parameters>", "forward>", "backward>", "saved>"],
        rows,
    )


def _signed(value: float, write: Any) -> str:
    return f"{'+' if value > 0 else '-'}{write(abs(value))}" if value else ""
