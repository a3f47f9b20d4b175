"""What the live page shows: the last minutes of one engine, as a few rows of numbers."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.serve.engine import StepReport
from toolkit.serve.scheduler import Scheduler

_KEPT_S = 300
# Of a busy second the page needs no more latencies than this.
_KEPT_LATENCIES = 20_000


@dataclass
class _Second:
    at: int
    num_waiting: int = 0
    num_running: int = 0
    kv_usage: float = 0.0
    num_prefilled: int = 0
    num_generated: int = 0


class Live:
    """Sums of the engine's steps by second, the last five minutes of them; measured."""

    def __init__(self) -> None:
        self._seconds: deque[_Second] = deque(maxlen=_KEPT_S)
        self._ttft_s: deque[tuple[float, float]] = deque(maxlen=_KEPT_LATENCIES)
        self._gaps_s: deque[tuple[float, float]] = deque(maxlen=_KEPT_LATENCIES)

    def step(self, report: StepReport, scheduler: Scheduler) -> None:
        """Count one step of the engine, by the engine's own clock."""
        at = int(report.end_s)
        if not self._seconds or self._seconds[-1].at != at:
            self._seconds.append(_Second(at))
        second = self._seconds[-1]
        second.num_waiting = scheduler.queue.num_requests
        second.num_running = scheduler.num_running
        second.kv_usage = scheduler.pool.usage
        second.num_generated += len(report.outputs)
        second.num_prefilled += report.num_prefilled
        for output in report.outputs:
            kept = self._ttft_s if output.index == 0 else self._gaps_s
            kept.append((report.end_s, output.gap_s))

    def body(self, now_s: float, scheduler: Scheduler) -> dict[str, Any]:
        """Return what the page draws: the present state, and series with one entry a second."""
        since = int(now_s) - _KEPT_S
        by_second = {second.at: second for second in self._seconds}
        rows = [by_second.get(at) for at in range(max(0, since), int(now_s))]
        tables = scheduler.tables
        return {
            "source": "measured",
            "now_s": now_s,
            "num_running": scheduler.num_running,
            "num_waiting": scheduler.queue.num_requests,
            "kv_usage": scheduler.pool.usage,
            "num_cached_blocks": scheduler.pool.num_cached,
            "num_blocks": scheduler.pool.num_blocks,
            "prefix_hit_rate": tables.num_hit / tables.num_queried if tables.num_queried else None,
            "num_preemptions": scheduler.num_preemptions,
            "num_finished": sum(scheduler.num_finished.values()),
            "ttft_s": _percentiles(self._recent(self._ttft_s, now_s)),
            "gap_s": _percentiles(self._recent(self._gaps_s, now_s)),
            "series": {
                "generated": [row.num_generated if row else 0 for row in rows],
                "prefilled": [row.num_prefilled if row else 0 for row in rows],
                # Between steps nothing runs: a second without one had an idle engine.
                "running": [row.num_running if row else 0 for row in rows],
                "waiting": [row.num_waiting if row else 0 for row in rows],
                "kv_usage": [row.kv_usage if row else 0.0 for row in rows],
            },
        }

    def _recent(self, kept: deque[tuple[float, float]], now_s: float) -> list[float]:
        return [value for at, value in kept if now_s - at <= 60]


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Return p50, p95 and p99 of the last minute, or None where there was nothing."""
    if not values:
        return None
    ordered = sorted(values)
    top = len(ordered) - 1
    return {f"p{p}": ordered[round(top * p / 100)] for p in (50, 95, 99)}
