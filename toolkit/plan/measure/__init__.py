"""Timing plans on this machine's ranks, side by side: what a prediction cannot tell apart."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import truediv
from pathlib import Path
from typing import Any

from toolkit.errors import UsageError
from toolkit.hardware import Cluster
from toolkit.hardware.affinity import usable_cores
from toolkit.plan import io, launch
from toolkit.plan.plan import Plan

# Called with how many runs are through, and of how many.
Progress = Callable[[int, int], None]
_RANKS = "toolkit.plan.measure.ranks"
ROUNDS = 3
_TIMEOUT_S = 300.0  # a run; a hang must not last


@dataclass(frozen=True)
class Measured:
    """What a plan's training steps took, AdamW included, in each round; or why it did not run.

    `relative` is to the mean of a round's plans, as a median over rounds: a machine that gets
    slower between rounds does not change it.
    """

    rounds_s: tuple[float, ...]
    relative: float | None = None
    refused: str = ""

    @property
    def step_s(self) -> float | None:
        """The median over rounds."""
        return statistics.median(self.rounds_s) if self.rounds_s else None


def check(num_ranks: int, cluster: Cluster) -> None:
    """Raise UsageError unless this machine has a device of its own for each of the ranks."""
    device = cluster.device(0)
    if device.kind == "cpu":
        have, what = usable_cores(), "cores"
    else:
        import torch

        have, what = torch.cuda.device_count(), "GPUs"
    if have < num_ranks:
        raise UsageError(
            f"cannot measure {num_ranks} ranks of {device.name} here: this machine has {have} "
            f"{what}",
            remedy="search without measuring, or for a cluster such as cpux2 that this machine is",
        )


def measure(
    plans: Sequence[Plan],
    *,
    rounds: int = ROUNDS,
    progress: Progress = lambda _done, _total: None,
) -> list[Measured]:
    """Train each plan for a few steps on ranks of this machine, in rounds of alternating order.

    All plans are for one number of ranks, which are started once. Raises ToolkitError when a rank
    dies; a plan that cannot be run says why instead.
    """
    runs = [index for number in range(rounds) for index in _order(len(plans), number)]
    with tempfile.TemporaryDirectory(prefix="toolkit-measure-") as name:
        folder = Path(name)
        paths = [folder / f"{index}.json" for index in range(len(plans))]
        for path, plan in zip(paths, plans, strict=True):
            io.save(plan, path)
        work, out = folder / "runs.json", folder / "found.jsonl"
        work.write_text(json.dumps([str(paths[index]) for index in runs]))
        out.write_text("")
        launch.run(
            ["-m", _RANKS, str(out), str(work)],
            plans[0].num_ranks,
            timeout_s=_TIMEOUT_S * len(runs),
            poll=lambda: progress(out.read_text().count("\n"), len(runs)),
        )
        entries = [json.loads(line) for line in out.read_text().splitlines()]
    return _together(len(plans), runs, entries)


def _together(count: int, runs: Sequence[int], entries: Sequence[dict[str, Any]]) -> list[Measured]:
    """What each plan's runs came to. A plan that ran once ran in every round."""
    by_plan: list[list[dict[str, Any]]] = [[] for _ in range(count)]
    for index, entry in zip(runs, entries, strict=True):
        by_plan[index].append(entry)
    refused = [own[0].get("refused", "") for own in by_plan]
    times = [tuple(entry["step_s"] for entry in own if "step_s" in entry) for own in by_plan]
    return _compared(times, refused)


def prolonged(first: Sequence[Measured], more: Sequence[Measured]) -> list[Measured]:
    """Return what plans that were measured twice took in all rounds."""
    times = [one.rounds_s + other.rounds_s for one, other in zip(first, more, strict=True)]
    return _compared(times, [""] * len(times))


def _compared(times: Sequence[tuple[float, ...]], refused: Sequence[str]) -> list[Measured]:
    means = [statistics.mean(round_) for round_ in zip(*filter(None, times), strict=True)]
    return [
        Measured(own, statistics.median(map(truediv, own, means)) if own else None, why)
        for own, why in zip(times, refused, strict=True)
    ]


def _order(count: int, number: int) -> range:
    return range(count) if number % 2 == 0 else range(count - 1, -1, -1)
