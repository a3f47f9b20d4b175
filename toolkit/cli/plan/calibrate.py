"""`toolkit plan calibrate`: how long a model's operators really take on this machine."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli import view
from toolkit.errors import UsageError


def calibrate(
    model: Annotated[str, typer.Argument(help="A zoo name, hf:<id or folder>, or module:factory.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The calibration file to write.")],
    cluster: Annotated[
        str, typer.Option(help="The ranks on this machine that plans will have, e.g. cpux2.")
    ] = "cpux2",
    size: Annotated[
        list[str] | None,
        typer.Option(help="A size of a microbatch and its values, e.g. batch=1,2 or tokens=128."),
    ] = None,
    as_json: view.Json = False,
) -> None:
    """Run a model's operators on all ranks at once, and fit the cost model to what they took.

    The machine should be quiet. Use it with `toolkit plan make` or `search` and --calibration; it
    is this machine's, and this number of ranks'.

    Example: toolkit plan calibrate gpt-mini --size batch=1,2 --size tokens=128,256 -o gpt.json
    """
    from toolkit.hardware import find_cluster
    from toolkit.plan import profile

    samples = _samples(size or ["batch=1,2"])
    where = find_cluster(cluster)
    with view.progress(quiet=as_json) as bar:
        task = bar.add_task(f"profile {model}", total=len(samples))
        made = profile.calibrate(
            [(model, sizes) for sizes in samples],
            where,
            progress=lambda done: bar.update(task, completed=done),
        )
    digest = made.save(output)
    rows = [
        {
            "class": name,
            "num_samples": found.fitted.num_samples,
            "median_error": found.held_out.median if found.held_out else None,
        }
        for name, found in made.classes.items()
    ]
    facts = {"path": str(output), "digest": digest, "device": made.device, "classes": rows,
             "notes": list(made.notes)}  # fmt: skip
    view.emit(
        facts,
        as_json=as_json,
        render=lambda: view.table(
            f"measured on {made.device}: {output}",
            ("class", "operators fitted>", "median error of others>"),
            [(row["class"], row["num_samples"], _percent(row["median_error"])) for row in rows],
        ),
    )


def _percent(part: object) -> str:
    return f"{part:.0%}" if isinstance(part, float) else "-"


def _samples(given: list[str]) -> list[dict[str, int]]:
    """All combinations of the values given.

    >>> _samples(["batch=1,2", "tokens=64"])
    [{'batch': 1, 'tokens': 64}, {'batch': 2, 'tokens': 64}]
    """
    values: dict[str, list[int]] = {}
    for text in given:
        name, _, numbers = text.partition("=")
        parts = numbers.split(",")
        if not name.isidentifier() or not all(part.isdigit() and int(part) for part in parts):
            raise UsageError(f"--size {text!r} is not name=number,...", remedy="e.g. batch=1,2")
        values[name] = [int(part) for part in parts]
    return [dict(zip(values, choice, strict=True)) for choice in product(*values.values())]
