"""`toolkit plan verify`: run plans here and compare with one device and with the prediction."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group

from toolkit.cli import view
from toolkit.errors import ToolkitError

if TYPE_CHECKING:
    from toolkit.plan.verify import Report


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
