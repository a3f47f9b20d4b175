"""Verifying a plan by running it: loss and every gradient as on one device, traffic as predicted.

`verify` starts the ranks; `python -m toolkit.plan.verify` is what each of them runs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import FormatError, ToolkitError, UsageError
from toolkit.plan import io, launch, parity
from toolkit.plan.parity import Parity
from toolkit.plan.plan import Plan, Traffic

# Steps before the counted one: the first sets up connections and pipelining's handshake.
_WARM_UP_STEPS = 1


@dataclass(frozen=True)
class TrafficRow:
    """One kind of communication of one stage's rank: (count, bytes) predicted and counted."""

    position: int
    kind: str
    predicted: tuple[int, int]
    counted: tuple[int, int]

    @property
    def holds(self) -> bool:
        return self.predicted == self.counted


@dataclass(frozen=True)
class Report:
    """What verification found; `holds` when everything agreed."""

    strategy: str
    rung: str
    dtype: str
    parity: Parity
    traffic: tuple[TrafficRow, ...]

    @property
    def holds(self) -> bool:
        return self.parity.holds and all(row.holds for row in self.traffic)


def verify(paths: Sequence[Path], *, dtype: str = "float32") -> list[Report]:
    """Run each plan on this machine and compare it with one device and with its prediction.

    All plans must be for the same number of ranks. Raises UsageError or FormatError for a plan
    file that cannot be read, ToolkitError when a rank fails.
    """
    parity.tolerance(dtype)
    plans = [io.load(path) for path in paths]
    numbers = sorted({plan.num_ranks for plan in plans})
    if len(numbers) != 1:
        raise UsageError(
            f"these plans are for {' and '.join(map(str, numbers))} ranks",
            remedy="verify plans of one number of ranks together",
        )
    for path, plan in zip(paths, plans, strict=True):
        if plan.prediction is None:
            raise FormatError(f"{path} holds no prediction to compare with")
    with tempfile.TemporaryDirectory(prefix="toolkit-verify-") as folder:
        out = Path(folder) / "report.json"
        names = [str(path.resolve()) for path in paths]
        launch.run(["-m", "toolkit.plan.verify", str(out), dtype, *names], numbers[0])
        found = json.loads(out.read_text())
    return [_from_json(entry) for entry in found]


def to_json(report: Report) -> dict[str, Any]:
    """Return the report as a JSON value."""
    return {**asdict(report), "holds": report.holds}


def _from_json(entry: dict[str, Any]) -> Report:
    rows = tuple(
        TrafficRow(row["position"], row["kind"], tuple(row["predicted"]), tuple(row["counted"]))
        for row in entry["traffic"]
    )
    found = {**entry["parity"], "missing": tuple(entry["parity"]["missing"])}
    return Report(entry["strategy"], entry["rung"], entry["dtype"], Parity(**found), rows)


def compare_traffic(
    predicted: Sequence[Traffic], counted: Sequence[dict[str, tuple[int, int]]]
) -> tuple[TrafficRow, ...]:
    """Join what was predicted for each stage with what its rank counted; absent means none."""
    expected = {(entry.position, entry.kind): (entry.count, entry.num_bytes) for entry in predicted}
    found = {
        (stage, kind): (calls[0], calls[1])
        for stage, calls_by_kind in enumerate(counted)
        for kind, calls in calls_by_kind.items()
    }
    return tuple(
        TrafficRow(
            stage, kind, expected.get((stage, kind), (0, 0)), found.get((stage, kind), (0, 0))
        )
        for stage, kind in sorted({*expected, *found})
    )


def run_rank(plan: Plan, here: Any, dtype: str) -> Report:
    """Verify one plan on this rank; every rank returns the same report."""
    import torch
    import torch.distributed as dist

    from toolkit.plan import runtime
    from toolkit.plan.counting import Counter

    torch_dtype = getattr(torch, dtype)
    batch = runtime.example(plan, here, batch=plan.provenance.sizes["batch"], seed=plan.seed + 1)
    want = parity.reference(runtime.build(plan, here, torch_dtype), batch)
    lowered = runtime.prepare(plan, here, dtype=torch_dtype)
    for step in range(_WARM_UP_STEPS + 1):
        lowered.zero_gradients()
        if step == _WARM_UP_STEPS:
            with Counter() as counter:
                loss = lowered.step(batch)
        else:
            lowered.step(batch)
    found = parity.compare(lowered, loss, want)
    gathered: list[Any] = [None] * here.num_ranks
    dist.all_gather_object(gathered, counter.calls)
    counted = gathered if len(plan.stages) > 1 else _same_on_all(gathered)
    assert plan.prediction is not None
    scale = torch_dtype.itemsize // getattr(torch, plan.provenance.dtype).itemsize
    predicted = [
        Traffic(row.position, row.kind, row.count, row.num_bytes * scale)
        for row in plan.prediction.traffic
    ]
    return Report(
        strategy=plan.strategy,
        rung=lowered.rung,
        dtype=dtype,
        parity=found,
        traffic=compare_traffic(predicted, counted),
    )


def _same_on_all(gathered: list[Any]) -> list[Any]:
    if any(calls != gathered[0] for calls in gathered):
        raise ToolkitError(f"ranks of one stage communicated differently: {gathered}")
    return gathered[:1]


def main() -> None:
    """What each rank runs: report.json dtype plan.json ..."""
    from toolkit.plan import runtime

    out, dtype, *paths = sys.argv[1:]
    try:
        with runtime.session() as here:
            reports = [run_rank(io.load(Path(path)), here, dtype) for path in paths]
    except ToolkitError as error:
        sys.exit(str(error))  # the parent shows it as what this rank printed
    if here.rank == 0:
        Path(out).write_text(json.dumps([to_json(report) for report in reports]))


if __name__ == "__main__":
    main()
