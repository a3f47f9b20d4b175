"""`toolkit plan make`: one strategy's plan, or the fastest of all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group

from toolkit.cli import view
from toolkit.cli.plan import again, picture
from toolkit.errors import UsageError, unknown_name
from toolkit.units import parse_bytes


def make(
    model: Annotated[str, typer.Argument(help="A zoo name, hf:<id or folder>, or module:factory.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan file to write.")],
    strategy: Annotated[
        str,
        typer.Option(
            help="A plan of the library (see `toolkit plan make x --strategy ?`), or auto."
        ),
    ] = "auto",
    program: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Instead of a strategy: a function that writes the plan with op-trans, op-assign "
            "and op-order (docs/howto/write-a-plan.md).",
        ),
    ] = None,
    cluster: Annotated[
        str, typer.Option(help="A name such as cpux2, h100x8, 4xh100x8, or a .toml file.")
    ] = "cpux2",
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks to use; default: every device.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples in the global batch.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a sample.")] = None,
    microbatches: Annotated[
        int | None, typer.Option(min=1, help="Pieces a rank's part of the batch is run in.")
    ] = None,
    degree: Annotated[
        list[str] | None,
        typer.Option(help="What only some strategies take, e.g. tensor=2, data=4, parts=8."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Type of the parameters and arithmetic.")] = "float32",
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Run each block's forward again in backward.")
    ] = False,
    offload: Annotated[
        str,
        typer.Option(help="What lives on the host: none, optimizer, or parameters (with shards)."),
    ] = "none",
    memory: Annotated[
        str | None, typer.Option(help="Limit a rank's memory, e.g. 4GiB; default: the device's.")
    ] = None,
    calibration: again.CalibrationFile = None,
    timeline: Annotated[
        Path | None, typer.Option(help="Also write the predicted step as a timeline.")
    ] = None,
    as_json: view.Json = False,
) -> None:
    """Trace a model, write a plan for it, and predict its step time, memory and traffic.

    Nothing is run and no weights are made. A request that nothing satisfies exits with 3 and says
    what would work.

    Example: toolkit plan make gpt-tiny --strategy 1f1b --cluster cpux2 --batch 16 -o plan.json
    """
    from toolkit.hardware import find_cluster
    from toolkit.models import factory
    from toolkit.plan import io, library, planner, predict, subject
    from toolkit.plan.plan import OFFLOADS
    from toolkit.timeline import files

    if offload not in OFFLOADS:
        raise unknown_name("offload", offload, OFFLOADS)
    where = find_cluster(cluster)
    degrees = _degrees(degree or [])
    if program and (degrees or ranks or strategy != planner.AUTO):
        raise UsageError(
            "--program says itself how many ranks there are and what each does",
            remedy="leave out --strategy, --degree and --ranks",
        )
    if strategy != planner.AUTO:
        library.find(strategy)
    elif degrees:
        raise UsageError(
            f"auto takes no degree ({', '.join(degrees)})", remedy="name a --strategy, or search"
        )
    options: dict[str, Any] = {
        "num_ranks": ranks,
        "microbatches": microbatches,
        "recompute": recompute,
        "offload": offload,
        "memory_limit_bytes": parse_bytes(memory) if memory else None,
        "calibration": again.calibration(calibration),
    }
    with view.progress(quiet=as_json) as bar:
        task = bar.add_task(f"trace {model}", total=None)
        traced = subject.load(model, dtype=dtype, batch=batch, tokens=tokens)
        if program:
            bar.update(task, description=f"predict {program}")
            write = factory.imported(program, "function")
            del options["num_ranks"]
            plan = planner.make_own(traced, where, write, **options)
        elif strategy == planner.AUTO:
            plan = planner.choose(
                traced, where, **options,
                progress=lambda name: bar.update(task, description=f"predict {name}"),
            )  # fmt: skip
        else:
            bar.update(task, description=f"predict {strategy}")
            plan = planner.make(traced, where, strategy, **{**options, **degrees})
    digest = io.save(plan, output)
    if timeline is not None:
        files.save(
            again.timeline(
                predict.simulated(plan, traced, where, calibration=options["calibration"]), plan
            ),
            timeline,
        )
    view.emit(
        {"path": str(output), "digest": digest, "plan": io.to_body(plan)},
        as_json=as_json,
        render=lambda: Group(
            *([picture.considered(plan), ""] if plan.considered else []),
            *picture.summary(plan),
            f"wrote {output}; run it with:",
            f"torchrun --nproc-per-node {plan.num_ranks} recipes/train.py --plan {output}",
        ),
    )


def _degrees(given: list[str]) -> dict[str, int]:
    found = {}
    for text in given:
        name, _, value = text.partition("=")
        if not name.isidentifier() or not value.isdigit() or int(value) < 1:
            raise UsageError(f"--degree {text!r} is not name=number", remedy="e.g. tensor=2")
        found[name] = int(value)
    return found
