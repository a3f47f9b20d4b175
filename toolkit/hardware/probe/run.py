"""Run the parts of the probe one after another; what fails is said to be not measured."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from toolkit import record
from toolkit.hardware import affinity, measured
from toolkit.hardware.probe import accelerator, collectives, disk, gemm, memory
from toolkit.units import MIB


@dataclass(frozen=True)
class Options:
    """How thorough the probe is. Budgets are seconds of measuring, set-up not counted."""

    quick: bool = False
    disk_folder: Path | None = None  # None: where the row is kept
    gemm_budget_s: float = 0.6
    memory_budget_s: float = 0.8
    disk_budget_s: float = 5.0
    collectives_budget_s: float = 8.0
    collectives_timeout_s: float = 90.0
    accelerator_budget_s: float = 5.0

    @classmethod
    def of(cls, *, quick: bool, disk_folder: Path | None = None) -> Options:
        """Return the usual options; quick ones take about ten seconds on two cores."""
        if not quick:
            return cls(disk_folder=disk_folder)
        return cls(
            quick=True, disk_folder=disk_folder, gemm_budget_s=0.15, memory_budget_s=0.2,
            disk_budget_s=1.0, collectives_budget_s=1.0, collectives_timeout_s=60.0,
            accelerator_budget_s=1.0,
        )  # fmt: skip


@dataclass
class Result:
    """The body of a probe record while it is being filled."""

    body: dict[str, Any]
    not_measured: dict[str, str] = field(default_factory=dict)

    def attempt(self, what: str, action: Callable[[], Any], default: Any = None) -> Any:
        """Return what `action` measures; on failure note why and return `default`."""
        try:
            return action()
        except Exception as error:  # one failing part must not cost the others; it is reported
            reason = (str(error).strip() or "no message").splitlines()[0]
            self.not_measured[what] = f"{type(error).__name__}: {reason}"
            return default

    def write(self, path: Path) -> str:
        """Write the record; return its digest."""
        return record.write(
            path,
            kind=measured.KIND,
            version=measured.VERSION,
            body={**self.body, "not_measured": self.not_measured},
        )


@dataclass(frozen=True)
class Part:
    """A step of the probe, with what a progress bar calls it."""

    title: str
    action: Callable[[Result], None]


def thread_counts(num_cores: int) -> tuple[int, ...]:
    """Return the thread counts to measure: all of them up to 8 cores, then doubling.

    >>> thread_counts(2), thread_counts(24)
    ((1, 2), (1, 2, 3, 4, 5, 6, 7, 8, 16, 24))
    """
    counts = list(range(1, min(num_cores, 8) + 1))
    while counts[-1] < num_cores:
        counts.append(min(2 * counts[-1], num_cores))
    return tuple(counts)


def parts(options: Options) -> tuple[Part, ...]:
    """Return the probe's parts in order."""
    cores = affinity.usable_cores()
    found = [Part("one small operator", lambda result: _overhead(result, options))]
    for count in thread_counts(cores):
        plural = "threads" if count > 1 else "thread"
        found.append(
            Part(
                f"GEMM and memory, {count} {plural}",
                lambda result, count=count: _threads(result, options, count),  # type: ignore[misc]
            )
        )
    found.append(Part("disk", lambda result: _disk(result, options)))
    for ranks in (2, 4):
        if ranks == 2 or ranks <= cores:
            found.append(
                Part(
                    f"gloo collectives, {ranks} ranks",
                    lambda result, ranks=ranks: _collectives(result, options, ranks),  # type: ignore[misc]
                )
            )
    found.append(Part("accelerators", lambda result: _accelerators(result, options)))
    return tuple(found)


def run(options: Options, *, on_part: Callable[[int, int, str], None] = lambda *_: None) -> Result:
    """Measure this machine. `on_part(done, total, title)` is told of every part before it runs.

    torch's thread count is set for each measurement and restored at the end; the process's CPU
    affinity and quota are respected. Parts that fail are listed in the result's `not_measured`.
    """
    import torch

    result = Result(
        {
            "fingerprint": vars(measured.Fingerprint.here()),
            "probed_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "quick": options.quick,
            "load_average": os.getloadavg()[0],
            "memory_bytes": memory.total_bytes(),
            "op_overhead_s": None,
            "threads": [],
            "disk": None,
            "collectives": [],
            "collective_points": {},
            "accelerators": [],
        }
    )
    steps = parts(options)
    threads_before = torch.get_num_threads()
    try:
        for number, part in enumerate(steps):
            on_part(number, len(steps), part.title)
            part.action(result)
        on_part(len(steps), len(steps), "done")
    finally:
        torch.set_num_threads(threads_before)
    return result


def _overhead(result: Result, options: Options) -> None:
    import torch

    torch.set_num_threads(1)
    result.body["op_overhead_s"] = result.attempt(
        "small operator", lambda: gemm.op_overhead_s(budget_s=options.gemm_budget_s)
    )


def _threads(result: Result, options: Options, count: int) -> None:
    import torch

    torch.set_num_threads(count)
    sizes = (512, 1024) if options.quick else (512, 1024, 2048)
    flops = {}
    for dtype in gemm.QUICK_DTYPES if options.quick else gemm.DTYPES:
        flops[dtype] = result.attempt(
            f"{dtype} GEMM, {count} threads",
            lambda dtype=dtype: gemm.flops(dtype, sizes, budget_s=options.gemm_budget_s),  # type: ignore[misc]
        )
    bandwidth = result.attempt(
        f"memory, {count} threads",
        lambda: memory.read_bandwidth(
            memory.array_bytes(quick=options.quick), budget_s=options.memory_budget_s
        ),
    )
    result.body["threads"].append(
        {"num_threads": count, "gemm_flops": flops, "memory_bandwidth": bandwidth}
    )


def _disk(result: Result, options: Options) -> None:
    folder = options.disk_folder or measured.default_path().parent
    result.body["disk"] = result.attempt(
        "disk",
        lambda: disk.measure(
            folder,
            file_bytes=(64 if options.quick else 512) * MIB,
            budget_s=options.disk_budget_s,
            readers=(1, 4),
        ),
    )


def _collectives(result: Result, options: Options, num_ranks: int) -> None:
    found = result.attempt(
        f"collectives, {num_ranks} ranks",
        lambda: collectives.measure(
            num_ranks,
            collectives.QUICK_SIZES if options.quick else collectives.SIZES,
            budget_s=options.collectives_budget_s,
            timeout_s=options.collectives_timeout_s,
        ),
        {"points": {}, "failed": {}},
    )
    result.body["collective_points"][str(num_ranks)] = found["points"]
    for kind, reason in found["failed"].items():
        result.not_measured[f"{kind}, {num_ranks} ranks"] = reason
    for kind, points in found["points"].items():
        result.body["collectives"].append(collectives.fit(kind, num_ranks, points))


def _accelerators(result: Result, options: Options) -> None:
    result.body["accelerators"] = result.attempt(
        "accelerators", lambda: accelerator.measure(budget_s=options.accelerator_budget_s), []
    )
