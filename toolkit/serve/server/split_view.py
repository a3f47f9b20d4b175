"""How a divided engine fares, for people and for Prometheus: layouts, steps, predictions, why."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from toolkit.serve.engine import Divided, Engine, StepReport
from toolkit.serve.request import Phase
from toolkit.serve.split.controller import Controller, Decision
from toolkit.serve.split.engine import DividedEngine
from toolkit.serve.split.predictor import Predictor

_STEP_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 10.0),
)
_KEPT_S = 300
# The page lists the newest changes; all that are kept are in the timeline.
_SHOWN_CHANGES = 12


def kind_of(divided: Divided) -> str:
    """Return the name of a step's kind: a phase, or "mixed"."""
    return "mixed" if divided.phase is None else divided.phase.value


class SplitMetrics:
    """The numbers of a divided engine beside those that every engine has."""

    def __init__(self, engine: DividedEngine, model_name: str, registry: CollectorRegistry) -> None:
        def labels(*more: str) -> list[str]:
            return ["model_name", *more]

        self._model_name = model_name
        self._controller = engine.controller
        units = Gauge(
            "toolkit:split_units",
            "Cores of a phase in the present layout; undivided, all for both.",
            labels("phase"),
            registry=registry,
        )
        for phase in Phase:
            units.labels(model_name, phase.value).set_function(
                lambda phase=phase: self._layout_units(phase)  # type: ignore[misc]
            )
        undivided = Gauge(
            "toolkit:split_undivided",
            "1 while steps hold both phases.",
            labels(),
            registry=registry,
        )
        undivided.labels(model_name).set_function(lambda: float(self._decision.layout.undivided))
        self._mode = Gauge(
            "toolkit:split_decode_first",
            "1 while the KV cache is so full that decode goes first.",
            labels(),
            registry=registry,
        )
        self._mode.labels(model_name).set_function(
            lambda: float(self._decision.mode.value == "decode first")
        )
        chunk = Gauge(
            "toolkit:split_chunk_tokens",
            "Tokens of prompts a mixed step may hold beside decoding requests; 0: no limit.",
            labels(),
            registry=registry,
        )
        chunk.labels(model_name).set_function(lambda: float(self._decision.chunk or 0))
        changes = Counter(
            "toolkit:split_changes", "Changes of layout.", labels(), registry=registry
        )
        self._changes = changes.labels(model_name)
        self._last: Decision = self._decision
        self._seconds = Histogram(
            "toolkit:phase_step_seconds",
            "What steps took, measured.",
            labels("phase"),
            registry=registry,
            buckets=_STEP_S,
        )
        self._predicted = Counter(
            "toolkit:phase_step_predicted_seconds",
            "What steps were predicted to take, added up.",
            labels("phase"),
            registry=registry,
        )
        error = Gauge(
            "toolkit:phase_prediction_error",
            "Median of |predicted / measured - 1| over the newest steps.",
            labels("phase"),
            registry=registry,
        )
        for kind in (*Phase, None):
            error.labels(model_name, "mixed" if kind is None else kind.value).set_function(
                lambda kind=kind: self._error(kind)  # type: ignore[misc]
            )
        self._lost = Counter(
            "toolkit:phase_steps_lost",
            "Steps that had no result and were computed again.",
            labels("phase"),
            registry=registry,
        )

    def follow(self, engine: DividedEngine) -> None:
        """Read from another engine from here on."""
        self._controller = engine.controller

    def step(self, report: StepReport) -> None:
        """Count one step of the engine."""
        divided = report.divided
        if divided is None:
            return
        if self._decision.layout is not self._last.layout:
            self._changes.inc()
        self._last = self._decision
        label = (self._model_name, kind_of(divided))
        if divided.lost:
            self._lost.labels(*label).inc()
            return
        self._seconds.labels(*label).observe(report.end_s - report.start_s)
        self._predicted.labels(*label).inc(divided.predicted_s or 0.0)

    @property
    def _decision(self) -> Decision:
        return self._controller.decision

    def _layout_units(self, phase: Phase) -> float:
        return self._decision.layout.of(phase).units

    def _error(self, kind: Phase | None) -> float:
        if not isinstance(self._controller, Predictor):
            return 0.0
        errors = self._controller.corrections[kind].errors
        return errors.median if errors else 0.0


@dataclass
class _Second:
    """Sums over the steps that ended in one second: by kind, how many, measured, predicted."""

    at: int
    layout: tuple[int, int]
    sums: dict[str, list[float]] = field(default_factory=dict)


class SplitLive:
    """What the live page shows of the split: the last five minutes by second, and why."""

    def __init__(self) -> None:
        self._seconds: deque[_Second] = deque(maxlen=_KEPT_S)

    def step(self, report: StepReport, controller: Controller) -> None:
        """Count one step, by the engine's own clock."""
        divided, at = report.divided, int(report.end_s)
        if divided is None:
            return
        layout = controller.decision.layout
        shown = (0, 0) if layout.undivided else (layout.prefill.units, layout.decode.units)
        if not self._seconds or self._seconds[-1].at != at:
            self._seconds.append(_Second(at, shown))
        second = self._seconds[-1]
        second.layout = shown
        if divided.lost:
            return
        sums = second.sums.setdefault(kind_of(divided), [0.0, 0.0, 0.0])
        for place, value in enumerate((1.0, report.end_s - report.start_s, divided.predicted_s)):
            sums[place] += value or 0.0

    def body(self, now_s: float, engine: Engine) -> dict[str, Any] | None:
        """Return the present layout, series by second, and the newest changes; None: undivided.

        Undivided seconds have 0 | 0 cores; a second without steps of a kind has no seconds a step.
        """
        if not isinstance(engine, DividedEngine):
            return None
        since, by_second = int(now_s) - _KEPT_S, {each.at: each for each in self._seconds}
        rows = [by_second.get(at) for at in range(max(0, since), int(now_s))]
        history, now = list(engine.controller.history), engine.controller.decision
        units: dict[str, list[int | None]] = {
            phase.value: [None if row is None else row.layout[place] for row in rows]
            for place, phase in enumerate((Phase.PREFILL, Phase.DECODE))
        }
        return {
            "layout": str(now.layout),
            "num_units": now.layout.prefill.device.num_units,
            "mode": now.mode.value,
            "chunk": now.chunk if now.layout.undivided else None,
            "why": now.reason,
            "num_steps": dict(engine.num_steps),
            "num_lost": engine.num_lost,
            "units": units,
            "step_s": {
                kind: {
                    "measured": [_mean(row, kind, 1) for row in rows],
                    "predicted": [_mean(row, kind, 2) for row in rows],
                }
                for kind in ("prefill", "decode", "mixed")
            },
            "changes": [
                {"at_s": one.since_s, "layout": str(one.layout), "why": one.reason}
                for one in reversed(history[-_SHOWN_CHANGES:])
            ],
        }


def _mean(row: _Second | None, kind: str, place: int) -> float | None:
    sums = None if row is None else row.sums.get(kind)
    return sums[place] / sums[0] if sums else None
