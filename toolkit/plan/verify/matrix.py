"""The matrix: every plan of the library on a model of every family, each against one device."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from toolkit.errors import InfeasibleError, UsageError
from toolkit.hardware import Cluster, find_cluster
from toolkit.plan import io, library, planner, subject
from toolkit.plan.plan import Plan
from toolkit.plan.subject import Subject
from toolkit.plan.verify import start
from toolkit.plan.verify.report import Report

Outcome = Literal["holds", "differs", "refused", "not applicable"]
# Called with a case, how many are through, and how many there are.
Progress = Callable[[str, int, int], None]

# A small model of each family and its sizes; a batch that 4 ranks x 2 microbatches divide.
MODELS: Mapping[str, dict[str, int]] = {
    "gpt-tiny": {"batch": 8, "tokens": 32},
    "swin-nano": {"batch": 8},
    "evoformer-tiny": {"batch": 8, "tokens": 8, "sequences": 4},
    "toolkit.plan.verify.matrix:evoformer_one_pass": {"batch": 8},
    "t5-tiny": {"batch": 8, "tokens": 16, "source_tokens": 16},
}
# The first of these that a strategy can use.
_MICROBATCHES = (2, 4, 8)


def evoformer_one_pass(batch: int = 8) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """evoformer-tiny without recycling: its blocks run once, as most plans ask."""
    import torch

    from toolkit.models import evoformer

    config = replace(evoformer.CONFIGS["evoformer-tiny"], num_passes=1)
    sequences, residues = 4, 8
    ids = torch.randint(20, (batch, sequences, residues))
    targets = torch.randint(20, (batch, sequences, residues))
    bins = torch.randint(64, (batch, residues, residues))
    return evoformer.build(config), (ids, targets, bins), {}


@dataclass(frozen=True)
class Case:
    """One plan of the matrix, or why there is none."""

    model: str
    strategy: str
    recompute: bool
    plan: Plan | None
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.model} {self.strategy}{' with recomputation' * self.recompute}"


@dataclass(frozen=True)
class Row:
    """What became of a case in one dtype. `reason` says why a plan does not apply or was refused;
    what differed is in the report.
    """

    model: str
    strategy: str
    recompute: bool
    microbatches: int | None
    dtype: str
    outcome: Outcome
    reason: str = ""
    report: Report | None = None


def cases(num_ranks: int, *, quick: bool = False) -> tuple[Case, ...]:
    """Write the plans of the matrix for `num_ranks` ranks. `quick` is the first family alone,
    without recomputation.
    """
    cluster = find_cluster(f"cpux{num_ranks}")
    found: list[Case] = []
    for model, sizes in list(MODELS.items())[: 1 if quick else None]:
        traced = subject.load(model, dtype="float32", **sizes)
        for strategy in library.STRATEGIES:
            for recompute in (False,) if quick else (False, True):
                found.append(_case(traced, cluster, strategy, recompute))
    return tuple(found)


def _case(traced: Subject, cluster: Cluster, strategy: str, recompute: bool) -> Case:
    reason = ""
    for microbatches in _MICROBATCHES:
        try:
            plan = planner.make(
                traced, cluster, strategy, microbatches=microbatches, recompute=recompute
            )
        except InfeasibleError as error:
            reason = reason or str(error)
        else:
            return Case(traced.model, strategy, recompute, plan)
    return Case(traced.model, strategy, recompute, None, reason)


def verify_all(
    num_ranks: int,
    *,
    dtypes: Sequence[str] = ("float32",),
    quick: bool = False,
    measure: bool | None = None,
    progress: Progress = lambda case, done, total: None,
) -> tuple[Row, ...]:
    """Verify every library plan on every family on `num_ranks` gloo ranks of this machine.

    The ranks are started once. In the dtypes after the first, plans with recomputation are left
    out: they compute the same again. `measure` (default: unless `quick`) tracks memory and times
    steps. Raises UsageError for a dtype in which agreement says nothing.
    """
    from toolkit.plan import parity

    for dtype in dtypes:
        parity.tolerance(dtype)
    if num_ranks < 2:
        raise UsageError(f"{num_ranks} rank is no plan to verify", remedy="use 2 or more")
    progress("tracing", 0, 1)
    made = cases(num_ranks, quick=quick)
    jobs = [
        (case, dtype)
        for place, dtype in enumerate(dtypes)
        for case in made
        if case.plan is not None and not (place and case.recompute)
    ]
    with tempfile.TemporaryDirectory(prefix="toolkit-plans-") as folder:
        paths = []
        for number, (case, dtype) in enumerate(jobs):
            assert case.plan is not None
            path = Path(folder) / f"{number}.json"
            io.save(case.plan, path)
            paths.append((path, dtype))

        def through(done: int) -> None:
            progress(str(jobs[min(done, len(jobs) - 1)][0]), done, len(jobs))

        reports = start.run(
            paths, num_ranks, measure=not quick if measure is None else measure, progress=through
        )
    rows = [_row(case, dtype, found) for (case, dtype), found in zip(jobs, reports, strict=True)]
    none = [
        Row(case.model, case.strategy, case.recompute, None, dtypes[0], "not applicable",
            case.reason)
        for case in made
        if case.plan is None
    ]  # fmt: skip
    return (*rows, *none)


def _row(case: Case, dtype: str, found: Report | str) -> Row:
    assert case.plan is not None
    outcome: Outcome = "refused"
    reason, report = "", None
    if isinstance(found, str):
        reason = found
    else:
        outcome, report = ("holds" if found.holds else "differs"), found
    microbatches = case.plan.microbatches
    return Row(
        case.model, case.strategy, case.recompute, microbatches, dtype, outcome, reason, report
    )
