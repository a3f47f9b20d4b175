"""`toolkit plan verify`: run plans here and compare with one device and with the prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group

from toolkit.cli import view
from toolkit.errors import ToolkitError, UsageError
from toolkit.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from toolkit.plan.verify import Report, Row


def verify(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Plans, all of one number of ranks.")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float32 (to 1e-5) or float64 (to 1e-10); --all takes several."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every plan of the library on models of four families.")
    ] = False,
    ranks: Annotated[int, typer.Option(min=2, help="With --all: ranks to start here.")] = 2,
    quick: Annotated[
        bool, typer.Option("--quick", help="With --all: the first family, nothing recomputed.")
    ] = False,
    dry: Annotated[
        bool,
        typer.Option(
            "--dry",
            help="Start no ranks: count the step of one plan, of any size, on shapes alone.",
        ),
    ] = False,
    as_json: view.Json = False,
) -> None:
    """Run plans on this machine and compare with one device and with what was predicted.

    The loss, every gradient and one optimizer step must be as on one device, communication as
    predicted, messages paired. The ranks are started here, as torchrun would. Exits with 1 when
    anything disagrees.

    Example: toolkit plan verify plan.json
    """
    dtypes = dtype or ["float32"]
    if everything:
        if paths:
            raise UsageError("--all brings its own plans", remedy="leave out the files, or --all")
        _everything(ranks, dtypes, quick=quick, as_json=as_json)
        return
    if not paths:
        raise UsageError("no plan to verify", remedy="name plan files, or use --all")
    if len(dtypes) > 1:
        raise UsageError(f"plan files are verified in one dtype, not {' and '.join(dtypes)}")
    if dry:
        _dry(paths, as_json=as_json)
        return
    from toolkit.plan import verify as verification

    with view.progress(quiet=as_json) as bar:
        bar.add_task(f"run {len(paths)} plan{'s' * (len(paths) > 1)}", total=None)
        reports = verification.verify(paths, dtype=dtypes[0])
    facts = {
        "holds": all(report.holds for report in reports),
        "reports": [verification.to_json(report) for report in reports],
    }
    view.emit(
        facts,
        as_json=as_json,
        render=lambda: Group(*(_verified(report) for report in reports)),
    )
    _refuse([report.strategy for report in reports if not report.holds])


def _dry(paths: list[Path], *, as_json: bool) -> None:
    from toolkit.plan import io
    from toolkit.plan.verify import dry

    if len(paths) > 1:
        raise UsageError(f"--dry counts one plan, not {len(paths)}")
    plan = io.load(paths[0])
    with view.progress(quiet=as_json) as bar:
        bar.add_task(f"count rank 0 of {plan.num_ranks:,}", total=None)
        found = dry.dry_run(plan)
    rows = [
        [entry.kind, f"{entry.counted[0]}, {entry.counted[1]:,}",
         f"{entry.predicted[0]}, {entry.predicted[1]:,}", _mark(entry.holds)]
        for entry in found.traffic
    ]  # fmt: skip
    title = f"{found.strategy}: rank 0 of {found.num_ranks:,}, no communication, no values"
    view.emit(
        {**asdict(found), "holds": found.holds},
        as_json=as_json,
        render=lambda: Group(
            view.table(title, ["calls and bytes", "counted>", "predicted>", ""], rows),
            f"counted in {format_seconds(found.seconds)}, {format_bytes(found.process_bytes)} held",
        ),
    )
    _refuse([] if found.holds else [found.strategy])


def _everything(ranks: int, dtypes: list[str], *, quick: bool, as_json: bool) -> None:
    from toolkit.plan import verify as verification

    with view.progress(quiet=as_json) as bar:
        task = bar.add_task("trace", total=None)

        def progress(case: str, done: int, total: int) -> None:
            bar.update(task, description=_short(case), completed=done, total=total)

        rows = verification.verify_all(ranks, dtypes=dtypes, quick=quick, progress=progress)
    failed = [row for row in rows if row.outcome in ("differs", "refused")]
    facts = {
        "holds": not failed,
        "ranks": ranks,
        "rows": [
            {**asdict(row), "report": verification.to_json(row.report) if row.report else None}
            for row in rows
        ],
    }
    view.emit(facts, as_json=as_json, render=lambda: _matrix(rows, ranks))
    _refuse([f"{_short(row.model)} {row.strategy}" for row in failed])


def _refuse(failed: list[str]) -> None:
    if failed:
        raise ToolkitError(
            f"{', '.join(failed)}: what was run differs from one device or from the prediction"
        )


def _matrix(rows: Sequence[Row], ranks: int) -> Any:
    lines = []
    for row in rows:
        report = row.report
        errors = ["", "", ""]
        if report is not None:
            found = (report.parity.loss_error, report.parity.gradient_error, report.update_error)
            errors = [f"{error:.1e}" for error in found]
        calls = sum(entry.counted[0] for entry in report.traffic) if report else ""
        rung = report.rung.partition(":")[0] if report else ""
        what = f"{row.strategy}{' + recompute' * row.recompute}"
        outcome = row.outcome if row.outcome == "holds" else f"{row.outcome}: {_why(row)}"
        lines.append([_short(row.model), what, row.dtype, rung, *errors, calls, outcome])
    columns = ["model", "plan", "dtype", "rung", "loss>", "gradients>", "update>", "calls>", ""]
    held = sum(row.outcome == "holds" for row in rows)
    title = f"{held} plans hold on {ranks} ranks: errors against one device, traffic as predicted"
    return view.table(title, columns, lines)


def _why(row: Row) -> str:
    if row.report is None:
        return row.reason
    wrong = [f"{entry.kind} of position {entry.position}: {entry.counted}, not {entry.predicted}"
             for entry in row.report.traffic if not entry.holds]  # fmt: skip
    return "; ".join([*wrong, *row.report.faults]) or "errors above the tolerance"


def _short(model: str) -> str:
    return model.rpartition(":")[2]


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
    rows.append(
        [f"parameters after a step, worst ({report.worst_update})", f"{report.update_error:.2g}",
         limit, _mark(report.update_error <= parity.tolerance)]
    )  # fmt: skip
    for row in report.traffic:
        rows.append(
            [
                f"position {row.position}: {row.kind}, calls and bytes",
                f"{row.counted[0]}, {row.counted[1]:,}",
                f"{row.predicted[0]}, {row.predicted[1]:,}",
                _mark(row.holds),
            ]
        )
    for fault in report.faults:
        rows.append([fault, "", "", _mark(False)])
    for entry in report.memory:
        rows.append(
            [f"position {entry.position}: memory at its fullest",
             format_bytes(entry.tracked_bytes), format_bytes(entry.predicted_bytes),
             f"{entry.error:+.1%}"]
        )  # fmt: skip
    if report.measured_step_s and report.predicted_step_s:
        rows.append(
            ["step", format_seconds(report.measured_step_s),
             format_seconds(report.predicted_step_s), "not checked"]
        )  # fmt: skip
    title = f"{report.strategy}, {report.dtype} ({report.rung})"
    return view.table(title, ["what", "measured>", "predicted or allowed>", ""], rows)


def _mark(holds: bool) -> str:
    return "ok" if holds else "[bold red]DIFFERS[/]"
