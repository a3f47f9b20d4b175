"""What was predicted and what was measured: a running ratio, and the error it left."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from toolkit.cost.calibration import Errors

# A ratio outside of this is a fault of the measurement, or of the model beyond repair by a factor.
_LEAST, _MOST = 0.1, 10.0
# A step that took so many times what the others did says little: it was disturbed.
_OUTLIER = 2.0


class Pair(NamedTuple):
    """One step's seconds, as predicted (corrections included) and as measured."""

    predicted_s: float
    measured_s: float


class Correction:
    """An exponentially weighted mean of measured over predicted, and the newest errors.

    >>> correction = Correction(weight=0.5)
    >>> correction.observe(model_s=1.0, measured_s=2.0)
    >>> correction.ratio, correction.apply(3.0)
    (1.5, 4.5)
    """

    def __init__(self, *, weight: float = 0.1, kept: int = 256) -> None:
        """`weight`: how much the newest step counts, in (0, 1]; `kept`: errors remembered."""
        assert 0 < weight <= 1, weight
        self.weight = weight
        self.ratio = 1.0
        self.num_observed = 0
        self._pairs: deque[Pair] = deque(maxlen=kept)

    def apply(self, model_s: float) -> float:
        """Return the corrected prediction of what the model says takes `model_s`."""
        return self.ratio * model_s

    def observe(self, *, model_s: float, measured_s: float) -> None:
        """Take in a step that the model alone said would take `model_s`."""
        if model_s <= 0 or measured_s <= 0:
            return
        self._pairs.append(Pair(self.ratio * model_s, measured_s))
        ratio = min(_MOST, max(_LEAST, measured_s / model_s))
        ratio = min(self.ratio * _OUTLIER, max(self.ratio / _OUTLIER, ratio))
        self.ratio += self.weight * (ratio - self.ratio)
        self.num_observed += 1

    def drift(self, ratio: float, part: float) -> None:
        """Move `part` (0 to 1) of the way to `ratio`: what was measured long ago says less."""
        self.ratio += part * (ratio - self.ratio)

    def observe_run(self, model_s: Sequence[float], measured_s: Sequence[float]) -> None:
        """Take in many steps of some length, one after another."""
        ratio, weight, note = self.ratio, self.weight, self._pairs.append
        for one_s, each_s in zip(model_s, measured_s, strict=True):
            note(Pair(ratio * one_s, each_s))
            found = min(_MOST, max(_LEAST, each_s / one_s))
            found = min(ratio * _OUTLIER, max(ratio / _OUTLIER, found))
            ratio += weight * (found - ratio)
        self.ratio = ratio
        self.num_observed += len(model_s)

    @property
    def errors(self) -> Errors | None:
        """|predicted - measured| / measured of the newest steps; None before the first."""
        return Errors.of([abs(one.predicted_s / one.measured_s - 1) for one in self._pairs])
