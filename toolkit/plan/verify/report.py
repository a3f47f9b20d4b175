"""What verification found, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

from toolkit.plan.parity import Parity
from toolkit.plan.plan import Traffic


@dataclass(frozen=True)
class TrafficRow:
    """One kind of communication of a rank at one position: (count, bytes) predicted and counted."""

    position: int
    kind: str
    predicted: tuple[int, int]
    counted: tuple[int, int]

    @property
    def holds(self) -> bool:
        return self.predicted == self.counted


@dataclass(frozen=True)
class MemoryRow:
    """Bytes at the fullest moment of a step of the fullest rank at one position."""

    position: int
    predicted_bytes: int
    tracked_bytes: int

    @property
    def error(self) -> float:
        """(predicted - tracked) / tracked."""
        return self.predicted_bytes / self.tracked_bytes - 1


@dataclass(frozen=True)
class Report:
    """What verification found; `holds` when everything that must agree did.

    `update_error` is of the parameters' change in one AdamW step, as a gradient's error is.
    `faults` say where ranks do not fit together: ranks of one position that communicate
    differently, a message without its receive, collectives in two orders. `memory` and the step's
    seconds are reported and decide nothing.
    """

    strategy: str
    rung: str
    dtype: str
    parity: Parity
    update_error: float
    worst_update: str
    traffic: tuple[TrafficRow, ...]
    faults: tuple[str, ...] = ()
    memory: tuple[MemoryRow, ...] = ()
    predicted_step_s: float | None = None
    measured_step_s: float | None = None

    @property
    def holds(self) -> bool:
        return (
            self.parity.holds
            and self.update_error <= self.parity.tolerance
            and all(row.holds for row in self.traffic)
            and not self.faults
        )


def to_json(report: Report) -> dict[str, Any]:
    """Return the report as a JSON value."""
    return {**asdict(report), "holds": report.holds}


def from_json(entry: Mapping[str, Any]) -> Report:
    """Read what `to_json` wrote."""
    return TypeAdapter(Report).validate_python(
        {name: value for name, value in entry.items() if name != "holds"}
    )


def compare_traffic(
    predicted: Sequence[Traffic], counted: Sequence[Mapping[str, tuple[int, int]]]
) -> tuple[TrafficRow, ...]:
    """Join what was predicted for each position with what a rank there counted; absent is none."""
    expected = {(entry.position, entry.kind): (entry.count, entry.num_bytes) for entry in predicted}
    found = {
        (position, kind): (calls[0], calls[1])
        for position, calls_by_kind in enumerate(counted)
        for kind, calls in calls_by_kind.items()
    }
    return tuple(
        TrafficRow(*key, expected.get(key, (0, 0)), found.get(key, (0, 0)))
        for key in sorted({*expected, *found})
    )
