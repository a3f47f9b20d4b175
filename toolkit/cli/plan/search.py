"""`toolkit plan search`: the fastest plan that fits, and what else there is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group

from toolkit.cli import view
from toolkit.cli.plan import again, picture
from toolkit.units import format_bytes, format_count, format_seconds, parse_bytes

if TYPE_CHECKING:
    from toolkit.plan.search.found import Found
    from toolkit.plan.search.measured import Timed


def search(
    model: Annotated[
        str,
        typer.Argument(help="A zoo name, hf:<id or folder>, module:factory, or a graph.json."),
    ],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan file to write.")],
    cluster: Annotated[
        str, typer.Option(help="A name such as cpux2, h100x8, 4xh100x8, or a .toml file.")
    ] = "cpux2",
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks to use; default: every device.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples in the global batch.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a sample.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of the parameters and arithmetic; default float32.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Limit a rank's memory, e.g. 4GiB; default: the device's.")
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds to search; the best found by then is kept.")
    ] = None,
    constraints: Annotated[
        Path | None, typer.Option(help="A .toml or .json file of what is ruled out or asked for.")
    ] = None,
    calibration: again.CalibrationFile = None,
    measure: Annotated[
        int | None,
        typer.Option(min=2, help="Time so many of the fastest on this machine; keep the fastest."),
    ] = None,
    timeline: Annotated[
        Path | None, typer.Option(help="Also write the predicted step as a timeline.")
    ] = None,
    as_json: view.Json = False,
) -> None:
    """Search the plan with the shortest predicted step that fits, over everything that can vary.

    Meshes, microbatches, schedules, stages, sharding, recomputation, offload, and how each operator
    is split. Nothing is run, but with --measure. When nothing fits, exits with 3 and says what came
    nearest.

    Example: toolkit plan search gpt-tiny --cluster cpux2 --batch 16 -o plan.json
    """
    from toolkit.hardware import find_cluster
    from toolkit.plan import io, predict, subject
    from toolkit.plan import measure as timing
    from toolkit.plan.search import constraints as rules
    from toolkit.plan.search import finalists
    from toolkit.plan.search import found as searching
    from toolkit.plan.search import measured as choosing
    from toolkit.timeline import files

    where = find_cluster(cluster)
    given = rules.load(constraints) if constraints else None
    measured = again.calibration(calibration)
    if measure is not None:
        timing.check(ranks or where.num_devices, where)
    with view.progress(quiet=as_json) as bar:
        task = bar.add_task(f"trace {model}", total=None)
        if model.endswith(".json"):
            traced = subject.read(Path(model), dtype=dtype, batch=batch, tokens=tokens)
        else:
            traced = subject.load(model, dtype=dtype or "float32", batch=batch, tokens=tokens)

        def progress(doing: str, best_s: float | None) -> None:
            best = f", best so far {format_seconds(best_s)}" if best_s is not None else ""
            bar.update(task, description=f"{doing}{best}")

        found = searching.search(
            traced,
            where,
            num_ranks=ranks,
            memory_limit_bytes=parse_bytes(memory) if memory else None,
            time_limit_s=time_limit,
            constraints=given,
            calibration=measured,
            num_finalists=measure or finalists.FEWEST,
            varied=measure is not None,
            progress=progress,
        )
        timed: tuple[Timed, ...] = ()
        if measure is not None:

            def through(done: int, total: int) -> None:
                bar.update(task, description="time the fastest", completed=done, total=total)

            found, timed = choosing.fastest(found, measure, progress=through)
    digest = io.save(found.plan, output)
    if timeline is not None:
        run = predict.simulated(found.plan, traced, where, calibration=measured)
        files.save(again.timeline(run, found.plan), timeline)
    facts = {
        "path": str(output),
        "digest": digest,
        "plan": io.to_body(found.plan),
        "description": found.best.description,
        "binding": found.binding,
        "frontier": [_candidate(one) for one in found.frontier],
        "considered": found.considered,
        "pruned": found.pruned,
        "search_s": found.seconds,
        "complete": found.complete,
    }
    if timed:
        facts["measured"] = [
            {**_candidate(one.finalist.candidate), "predicted_s": one.finalist.predicted_s,
             "measured_s": one.measured.step_s, "relative": one.measured.relative,
             "rounds_s": one.measured.rounds_s, "refused": one.measured.refused}
            for one in timed
        ]  # fmt: skip
    view.emit(facts, as_json=as_json, render=lambda: Group(*_found(found, timed, output)))


def _candidate(one: Any) -> dict[str, Any]:
    return {
        "description": one.description,
        "step_s": one.step_s,
        "peak_bytes": one.peak_bytes,
    }


def _found(found: Found, timed: Sequence[Timed], output: Path) -> list[Any]:
    rows = [
        [one.description, format_seconds(one.step_s), format_bytes(one.peak_bytes)]
        for one in found.frontier
    ]
    ended = "" if found.complete else "; time ran out, so there may be better"
    return [
        view.table(
            "Frontier: nothing considered is both faster and smaller",
            ["plan", "step, predicted>", "memory, predicted>"],
            rows,
        ),
        "",
        *([_timed(timed), ""] if timed else []),
        *picture.summary(found.plan),
        f"bound by {found.binding}",
        f"{format_count(found.considered)} candidates considered, {format_count(found.pruned)} "
        f"meshes ruled out by bounds, in {format_seconds(found.seconds)}{ended}",
        f"wrote {output}; check it with: toolkit plan verify {output}",
    ]


def _timed(timed: Sequence[Timed]) -> Any:
    rows = [
        [
            one.finalist.candidate.description,
            format_seconds(one.finalist.predicted_s),
            format_seconds(one.measured.step_s) if one.measured.step_s else one.measured.refused,
            " ".join(format_seconds(seconds) for seconds in one.measured.rounds_s),
        ]
        for one in timed
    ]
    return view.table(
        "Timed on this machine, AdamW included: the first is the plan",
        ["plan", "step, predicted>", "measured>", "rounds"],
        rows,
    )
