"""What a step is expected to take: the cost model, and what was learnt from steps like it."""

from __future__ import annotations

from collections.abc import Mapping

from toolkit.serve.request import Phase
from toolkit.serve.split.correction import Correction
from toolkit.serve.split.cost_model import CostModel, Usage
from toolkit.serve.split.work import Load


class Predictor:
    """The cost model, and how far it was off for each kind of step."""

    def __init__(self, cost: CostModel, *, weight: float = 0.1) -> None:
        self.cost = cost
        self.corrections: dict[Phase | None, Correction] = {
            kind: Correction(weight=weight) for kind in (Phase.PREFILL, Phase.DECODE, None)
        }
        # A chunk of prompt outlasts many steps of decoding: what it takes alone is kept.
        self._usages: dict[Phase, tuple[Load, float, Usage]] = {}

    def predict(self, loads: Mapping[Phase, Load], own: Phase | None, share: float) -> float:
        """Return the model's seconds, uncorrected; see `Controller.predict`."""
        cost = self.cost
        if own is None:
            return cost.undivided(loads.get(Phase.PREFILL, Load()), loads.get(Phase.DECODE, Load()))
        other = Phase.DECODE if own is Phase.PREFILL else Phase.PREFILL
        usage = self._usage(loads[own], own, share)
        if share >= 1.0 or not loads.get(other):
            return usage.seconds
        return cost.beside(usage, self._usage(loads[other], other, 1.0 - share))

    def beside(self, loads: Mapping[Phase, Load], share: float) -> Usage | None:
        """Return what decoding on `share` of the device is predicted to run beside, if anything."""
        other = loads.get(Phase.PREFILL)
        return self._usage(other, Phase.PREFILL, 1.0 - share) if other and share < 1.0 else None

    def _usage(self, load: Load, phase: Phase, share: float) -> Usage:
        known = self._usages.get(phase)
        if known is None or known[0] is not load or known[1] != share:
            known = (load, share, self.cost.alone(load, phase, share))
            self._usages[phase] = known
        return known[2]

    def observe(self, own: Phase | None, model_s: float, measured_s: float) -> float:
        """Take in a step's measured seconds; return those predicted, correction included."""
        correction = self.corrections[own]
        predicted_s = correction.apply(model_s)
        correction.observe(model_s=model_s, measured_s=measured_s)
        return predicted_s
