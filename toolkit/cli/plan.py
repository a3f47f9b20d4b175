"""`toolkit plan`: plan how a model is trained over many devices; show, simulate, verify plans."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group

from toolkit.cli import view
from toolkit.errors import ToolkitError
from toolkit.units import (
    format_bytes,
    format_count,
    format_flops,
    format_seconds,
    parse_bytes,
)

if TYPE_CHECKING:
    from toolkit.plan.plan import Plan
    from toolkit.plan.planner import Outcome
    from toolkit.plan.simulate import Run
    from toolkit.plan.verify import Report
    from toolkit.timeline import Timeline

app = typer.Typer(
    help="Plan how a model is trained over many devices.",
    no_args_is_help=True,
    add_completion=False,
    epilog="Example: toolkit plan make gpt-tiny --strategy fsdp --cluster cpux2 -o plan.json",
)

PlanFile = Annotated[Path, typer.Argument(help="A plan written by `toolkit plan make`.")]
Cluster = Annotated[
    str | None,
    typer.Option("--cluster", help="Predict on this cluster instead of the plan's own."),
]


@app.command()
def make(
    model: Annotated[str, typer.Argument(help="A zoo name, hf:<id or folder>, or module:factory.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan file to write.")],
    strategy: Annotated[
        str, typer.Option(help="dp, fsdp, tp, 1f1b, or auto: the fastest predicted that fits.")
    ] = "auto",
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
    dtype: Annotated[str, typer.Option(help="Type of the parameters and arithmetic.")] = "float32",
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Run each block's forward again in backward.")
    ] = False,
    memory: Annotated[
        str | None, typer.Option(help="Limit a rank's memory, e.g. 4GiB; default: the device's.")
    ] = None,
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
    from toolkit.plan import io, library, planner, predict, subject
    from toolkit.timeline import files

    where = find_cluster(cluster)
    if strategy != planner.AUTO:
        library.find(strategy)
    options: dict[str, Any] = {
        "num_ranks": ranks,
        "microbatches": microbatches,
        "recompute": recompute,
        "memory_limit_bytes": parse_bytes(memory) if memory else None,
    }
    with view.progress(quiet=as_json) as bar:
        task = bar.add_task(f"trace {model}", total=None)
        traced = subject.load(model, dtype=dtype, batch=batch, tokens=tokens)
        outcomes: tuple[Outcome, ...] = ()
        if strategy == planner.AUTO:
            plan, outcomes = planner.choose(
                traced, where, **options,
                progress=lambda name: bar.update(task, description=f"predict {name}"),
            )  # fmt: skip
        else:
            bar.update(task, description=f"predict {strategy}")
            plan = planner.make(traced, where, strategy, **options)
    digest = io.save(plan, output)
    if timeline is not None:
        files.save(_timeline(predict.simulated(plan, traced, where), plan), timeline)
    facts: dict[str, Any] = {"path": str(output), "digest": digest, "plan": io.to_body(plan)}
    if outcomes:
        facts["considered"] = [
            {"strategy": entry.strategy, "step_s": entry.step_s, "reason": entry.reason or None}
            for entry in outcomes
        ]
    view.emit(
        facts,
        as_json=as_json,
        render=lambda: Group(
            *([_considered(outcomes, plan), ""] if outcomes else []),
            *_summary(plan),
            f"wrote {output}; run it with:",
            f"torchrun --nproc-per-node {plan.num_ranks} recipes/train.py --plan {output}",
        ),
    )


@app.command()
def show(path: PlanFile, cluster: Cluster = None, as_json: view.Json = False) -> None:
    """Show a plan: what is split how, what is predicted, and the predicted step in time.

    Example: toolkit plan show plan.json
    """
    from toolkit.plan import io
    from toolkit.timeline import terminal

    plan = io.load(path)
    if as_json:
        view.emit(io.to_body(plan), as_json=True, render=lambda: None)
        return
    run = _simulate(plan, cluster, quiet=False)
    view.emit(
        {},
        as_json=False,
        render=lambda: Group(
            *_summary(plan),
            _order(plan),
            "",
            terminal.render(_timeline(run, plan)),
        ),
    )


@app.command()
def simulate(
    path: PlanFile,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The timeline file to write.")
    ] = Path("timeline.json"),
    cluster: Cluster = None,
    as_json: view.Json = False,
) -> None:
    """Simulate one step of a plan and write its predicted timeline.

    Example: toolkit plan simulate plan.json -o timeline.json
    """
    from toolkit.plan import io
    from toolkit.timeline import files

    plan = io.load(path)
    run = _simulate(plan, cluster, quiet=as_json)
    made = _timeline(run, plan)
    files.save(made, output)
    facts = {
        "path": str(output),
        "source": "predicted",
        "step_s": run.step_s,
        "bubble": run.bubble,
        "spans": len(made.spans),
    }
    view.emit(
        facts,
        as_json=as_json,
        render=lambda: (
            f"predicted step {format_seconds(run.step_s)}, bubble {run.bubble:.1%}; wrote "
            f"{len(made.spans)} spans to {output} (look at it: toolkit timeline show {output})"
        ),
    )


@app.command()
def verify(
    paths: Annotated[list[Path], typer.Argument(help="Plans, all of one number of ranks.")],
    dtype: Annotated[
        str, typer.Option(help="float32 (to 1e-5) or float64 (to 1e-10).")
    ] = "float32",
    as_json: view.Json = False,
) -> None:
    """Run plans on this machine: loss and gradients as on one device, traffic as predicted.

    The ranks are started here, as torchrun would. Exits with 1 when anything disagrees.

    Example: toolkit plan verify plan.json
    """
    from toolkit.plan import verify as verification

    with view.progress(quiet=as_json) as bar:
        bar.add_task(f"run {len(paths)} plan{'s' * (len(paths) > 1)}", total=None)
        reports = verification.verify(paths, dtype=dtype)
    facts = {
        "holds": all(report.holds for report in reports),
        "reports": [verification.to_json(report) for report in reports],
    }
    view.emit(
        facts,
        as_json=as_json,
        render=lambda: Group(*(_verified(report) for report in reports)),
    )
    failed = [report.strategy for report in reports if not report.holds]
    if failed:
        raise ToolkitError(
            f"{', '.join(failed)}: what was run differs from one device or from the prediction"
        )


def _simulate(plan: Plan, cluster: str | None, *, quiet: bool) -> Run:
    from toolkit.hardware import find_cluster
    from toolkit.plan import predict, subject

    where = find_cluster(cluster or plan.provenance.cluster)
    predict.check_fits(plan.num_ranks, where)
    with view.progress(quiet=quiet) as bar:
        bar.add_task(f"trace {plan.provenance.model}", total=None)
        traced = subject.of(plan)
        subject.check_same(traced, plan)
        return predict.simulated(plan, traced, where)


def _timeline(run: Run, plan: Plan) -> Timeline:
    return run.timeline(f"{plan.strategy}: one step, predicted")


def _summary(plan: Plan) -> list[Any]:
    prediction = plan.prediction
    came = plan.provenance
    mesh = " x ".join(f"{axis.name} {axis.size}" for axis in plan.mesh)
    rows = [
        ["model", f"{came.model}, {came.dtype}"],
        ["sizes", ", ".join(f"{name} {size:,}" for name, size in came.sizes.items())],
        ["mesh", f"{mesh} on {came.cluster}"],
        ["microbatches", f"{plan.microbatches} of {plan.microbatch}"],
        ["placements", _placements(plan)],
        ["stages", _stages(plan)],
        ["recompute", f"{len(plan.recompute)} blocks" if plan.recompute else "nothing"],
    ]
    shown: list[Any] = [view.table(f"Plan: {plan.strategy}", ["what", "value"], rows)]
    if prediction is None:
        return shown
    numbers = [
        ["step time", format_seconds(prediction.step_s)],
        ["model FLOPs a step", format_flops(prediction.model_flops)],
        ["MFU", f"{prediction.mfu:.1%}"],
        ["bubble", f"{prediction.bubble:.1%}"],
        [
            "memory of the fullest rank",
            f"{format_bytes(prediction.peak_bytes)} of "
            f"{format_bytes(prediction.memory_limit_bytes)}",
        ],
    ]
    totals = [sum(entries.values()) for entries in prediction.memory_bytes]
    fullest = totals.index(max(totals))
    memory = [[name, format_bytes(size)] for name, size in prediction.memory_bytes[fullest].items()]
    traffic = [
        [row.position, row.kind, format_count(row.count), format_bytes(row.num_bytes)]
        for row in prediction.traffic
    ]
    return [
        *shown,
        view.table("Predicted, one step", ["what", "predicted>"], numbers),
        view.table(
            f"Predicted memory of the fullest rank (stage {fullest})",
            ["category", "predicted>"],
            memory,
        ),
        view.table("Predicted traffic of a rank", ["stage>", "kind", "calls>", "bytes>"], traffic),
    ]


def _placements(plan: Plan) -> str:
    counts: dict[str, list[str]] = {}
    for entry in plan.placements:
        counts.setdefault(entry.how, []).append(entry.module or "(root)")
    return (
        "; ".join(
            f"{how}: {', '.join(paths[:4])}" + (f" and {len(paths) - 4} more" * (len(paths) > 4))
            for how, paths in counts.items()
        )
        or "none"
    )


def _stages(plan: Plan) -> str:
    return "; ".join(
        f"{index}: {stage.blocks[0]} to {stage.blocks[-1]}"
        for index, stage in enumerate(plan.stages)
    )


def _order(plan: Plan) -> Any:
    rows = [
        [stage, " ".join(str(action) for action in row[:24]) + (" ..." if len(row) > 24 else "")]
        for stage, row in enumerate(plan.order)
    ]
    return view.table("Order (stage, F or B, microbatch)", ["stage>", "actions"], rows)


def _considered(outcomes: tuple[Outcome, ...], chosen: Plan) -> Any:
    rows = []
    for entry in outcomes:
        prediction = entry.plan.prediction if entry.plan else None
        mark = "chosen" if entry.strategy == chosen.strategy else entry.reason
        rows.append(
            [
                entry.strategy,
                format_seconds(prediction.step_s) if prediction else "",
                format_bytes(prediction.peak_bytes) if prediction else "",
                mark,
            ]
        )
    columns = ["strategy", "step, predicted>", "memory, predicted>", ""]
    return view.table("Strategies considered", columns, rows)


def _verified(report: Report) -> Any:
    parity = report.parity
    limit = f"<= {parity.tolerance:g}"
    rows = [
        ["loss, relative error", f"{parity.loss_error:.2g}", limit,
         _mark(parity.loss_error <= parity.tolerance)],
        [f"{parity.num_gradients} gradients, worst ({parity.worst_gradient})",
         f"{parity.gradient_error:.2g}", limit,
         _mark(parity.gradient_error <= parity.tolerance and not parity.missing)],
    ]  # fmt: skip
    for row in report.traffic:
        rows.append(
            [
                f"position {row.position}: {row.kind}, calls and bytes",
                f"{row.counted[0]}, {row.counted[1]:,}",
                f"{row.predicted[0]}, {row.predicted[1]:,}",
                _mark(row.holds),
            ]
        )
    title = f"{report.strategy}, {report.dtype} ({report.rung})"
    return view.table(title, ["what", "measured>", "predicted or allowed>", ""], rows)


def _mark(holds: bool) -> str:
    return "ok" if holds else "[bold red]DIFFERS[/]"
