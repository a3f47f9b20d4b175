"""Chooses how the device is laid out, step by step, and says why.

Nexus divides always. Here "undivided" is one of the layouts (as in DuetServe, arXiv 2511.04791),
because dividing reads the weights twice and leaves units idle where the load is one-sided. The
choice:

- With a target for the time between tokens: undivided while the predicted mixed step keeps it.
- Without: whichever loses less time until the present chunk of prompt is done, in request-seconds.
All
  waiting prompts lose the chunk's time. A decoding request loses what it could have done alone in
  the meantime, where a step of T_alone gives it a token:

      undivided: waiting * T_mixed   + decoding * (T_mixed - T_alone)
      divided:   waiting * T_prefill + decoding * T_prefill * (1 - T_alone / T_decode)

  A long queue so makes for undivided steps, which get through the most tokens; many decoding
  requests beside a few long prompts make for a division.

Divisions come from Nexus's search (`search.py`): the cut of either mode is weighed. With the
paper's slacks the two can contradict each other, and then "decode first" leaves decode fewer units
than "prefill first" does, because each mode keeps the other phase's slack. Told never to undivide,
the controller does as the paper says; else the KV cache being full leaves only the cut that is
better for decode. Against toggling: a change must save `margin` of what is predicted without it (a
Nexus cut: move by `delta`), and nothing changes within `dwell_s` of the last change. Times are
arguments; nothing here reads a clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from toolkit.errors import InfeasibleError, UsageError
from toolkit.serve.request import Phase
from toolkit.serve.split import layouts
from toolkit.serve.split.correction import Correction
from toolkit.serve.split.cost_model import CostModel, Usage
from toolkit.serve.split.layouts import Layout
from toolkit.serve.split.search import Mode, SearchConfig, greedy, search
from toolkit.serve.split.work import Load
from toolkit.units import format_seconds


@dataclass(frozen=True, slots=True)
class Situation:
    """What the controller sees: what either phase computes now or next, and who waits for it.

    `waiting` prompts are queued or being computed, `decoding` requests have tokens to come;
    `kv_usage` is the part of the KV cache in use, 0 to 1.
    """

    prefill: Load
    decode: Load
    waiting: int
    decoding: int
    kv_usage: float


class Forecast(NamedTuple):
    """Predicted seconds of the coming steps: either phase divided, and one of both undivided."""

    prefill_s: float
    decode_s: float
    undivided_s: float

    def at(self, cut: Layout) -> str:
        """Say it for people."""
        return (
            f"predicted {format_seconds(self.prefill_s)} a chunk, {format_seconds(self.decode_s)} "
            f"a token divided {cut}, {format_seconds(self.undivided_s)} for both undivided"
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """A layout, since when it holds, and why, in a sentence for people."""

    layout: Layout
    since_s: float
    reason: str
    mode: Mode = Mode.PREFILL
    forecast: Forecast | None = None


class Controller(Protocol):
    """Whoever lays the device out. Asked before steps begin, told when they are over."""

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Every layout it may ever choose, so that they can be made at the start."""
        ...

    @property
    def history(self) -> Sequence[Decision]:
        """The newest changes of layout, in order; the last is the present one."""
        ...

    def decide(self, look: Callable[[], Situation], now: float) -> Decision:
        """Return the layout for steps beginning at `now`; `look` gives the situation."""
        ...

    def rests(self, now: float) -> bool:
        """Return whether `decide` would give the present decision at `now` without looking."""
        ...

    def predict(self, loads: Mapping[Phase, Load], own: Phase | None, share: float) -> float:
        """Return the model's seconds of a step of `own` (None: mixed) on `share`, uncorrected.

        `loads` are those computed meanwhile; a phase that is not in it has nothing beside `own`.
        """
        ...

    def observe(self, own: Phase | None, model_s: float, measured_s: float) -> None:
        """Take in what a step took that `predict` had said would take `model_s`."""
        ...


@dataclass(frozen=True)
class ControllerConfig:
    """How the dynamic controller chooses. `search` is the division's.

    `may_undivide` lets it leave the device undivided; without, it is Nexus's. `tbt_target_s` is the
    time between tokens that is promised, if one is. `margin` is what a change between divided and
    undivided must save, as a part of what is predicted without it; `dwell_s` passes between
    changes; the situation is looked at every `interval_s`.
    """

    search: SearchConfig = field(default_factory=SearchConfig)
    may_undivide: bool = True
    tbt_target_s: float | None = None
    margin: float = 0.1
    dwell_s: float = 1.0
    interval_s: float = 0.1
    correction_weight: float = 0.1

    def __post_init__(self) -> None:
        if self.tbt_target_s is not None and self.tbt_target_s <= 0:
            raise UsageError(f"{self.tbt_target_s} s between tokens cannot be kept")
        if not 0 <= self.margin < 1 or self.dwell_s < 0 or self.interval_s < 0:
            raise UsageError(
                f"margin {self.margin} must be in [0, 1), dwell {self.dwell_s} s and interval "
                f"{self.interval_s} s at least 0"
            )


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

    def observe(self, own: Phase | None, model_s: float, measured_s: float) -> None:
        """Take in a step's measured seconds."""
        self.corrections[own].observe(model_s=model_s, measured_s=measured_s)


class Fixed(Predictor):
    """Always the same layout: the undivided engine, a static split, or two devices."""

    def __init__(self, cost: CostModel, layout: Layout) -> None:
        super().__init__(cost)
        self._decision = Decision(layout, 0.0, f"{layout}, as told")

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return (self._decision.layout,)

    @property
    def history(self) -> Sequence[Decision]:
        return (self._decision,)

    def decide(self, look: Callable[[], Situation], now: float) -> Decision:
        """Return the layout."""
        return self._decision

    def rests(self, now: float) -> bool:
        """Always."""
        return True


class Dynamic(Predictor):
    """Divides by the cost model, again and again; see the head of this file."""

    def __init__(self, cost: CostModel, config: ControllerConfig | None = None) -> None:
        """Raises InfeasibleError where the device cannot be divided and must be."""
        self.config = config or ControllerConfig()
        super().__init__(cost, weight=self.config.correction_weight)
        device = cost.device
        self._undivided = layouts.undivided(device)
        try:
            self._cuts = layouts.divided(device)
        except InfeasibleError:
            if not self.config.may_undivide:
                raise
            self._cuts = ()
        self._delta = self.config.search.delta_units(device)
        # Prefill's part of the units at each cut, as the cost model wants it.
        self._shares = [cut.prefill.fraction for cut in self._cuts]
        # The cut last applied or weighed, and where either mode's search ended last.
        self._at = len(self._cuts) // 2
        self._near = dict.fromkeys(Mode, self._at)
        self._mode = Mode.PREFILL
        first = self._undivided if self.config.may_undivide or not self._cuts else None
        self.decision = Decision(first or self._cuts[self._at], 0.0, "nothing was asked for yet")
        self.history: deque[Decision] = deque([self.decision], maxlen=1024)
        self._changed_s = float("-inf")
        self._looked_s = float("-inf")
        self.num_changes = 0
        self.num_evaluations = 0

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The undivided one, if it may be chosen, and every division."""
        return (*([self._undivided] if self.config.may_undivide else []), *self._cuts)

    def decide(self, look: Callable[[], Situation], now: float) -> Decision:
        """Return the layout for what is coming; the present one while it is too early to change.

        Where one phase has nothing to do the layout stays: whoever launches steps gives a phase
        that is alone the whole device anyway.
        """
        if self.rests(now):
            return self.decision
        self._looked_s = now
        situation = look()
        if not (situation.prefill and situation.decode):
            return self.decision
        self._mode = self.config.search.mode(situation.kv_usage, self._mode)
        layout, forecast, reason = self._choose(situation)
        changes = layout is not self.decision.layout
        since_s = now if changes else self.decision.since_s
        self.decision = Decision(layout, since_s, reason, self._mode, forecast)
        if changes:
            self._changed_s = now
            self.num_changes += 1
            self.history.append(self.decision)
        return self.decision

    def rests(self, now: float) -> bool:
        """Return whether it is too early to change, or to look again."""
        early = now - self._changed_s < self.config.dwell_s
        return early or now - self._looked_s < self.config.interval_s or not self._cuts

    def _choose(self, situation: Situation) -> tuple[Layout, Forecast, str]:
        """Return the layout, what it is expected to take, and why."""
        cost, config = self.cost, self.config
        mixed_s = self.corrections[None].apply(cost.undivided(situation.prefill, situation.decode))
        known: dict[int, tuple[float, float]] = {}

        def seconds(cut: int) -> tuple[float, float]:
            if cut not in known:
                self.num_evaluations += 1
                known[cut] = cost.divided(situation.prefill, situation.decode, self._shares[cut])
            return known[cut]

        def forecast(cut: int) -> Forecast:
            prefill_s, decode_s = seconds(cut)
            return Forecast(
                self.corrections[Phase.PREFILL].apply(prefill_s),
                self.corrections[Phase.DECODE].apply(decode_s),
                mixed_s,
            )

        least = {
            Phase.PREFILL: cost.alone(situation.prefill, Phase.PREFILL).seconds,
            Phase.DECODE: cost.alone(situation.decode, Phase.DECODE).seconds,
        }

        def found(mode: Mode) -> int:
            # The constraint compares a phase with itself: its correction would cancel.
            self._near[mode] = search(
                len(self._cuts),
                lambda cut: seconds(cut)[0],
                lambda cut: seconds(cut)[1],
                least_prefill_s=least[Phase.PREFILL],
                least_decode_s=least[Phase.DECODE],
                mode=mode,
                config=config.search,
                start=self._near[mode],
            )
            return self._near[mode]

        if not config.may_undivide:
            at = self._steady(found(self._mode))
            return (
                self._cuts[at],
                forecast(at),
                f"{self._mode.value}: {forecast(at).at(self._cuts[at])}",
            )
        if config.tbt_target_s is not None:
            return self._by_target(config.tbt_target_s, mixed_s, forecast)
        cuts = {found(mode) for mode in Mode}
        if self._mode is Mode.DECODE:
            cuts = {min(cuts)}
        return self._by_time_lost(situation, cuts, least[Phase.DECODE], forecast)

    def _by_target(
        self, target_s: float, mixed_s: float, forecast: Callable[[int], Forecast]
    ) -> tuple[Layout, Forecast, str]:
        """Undivided while that keeps the target, else the largest part for prefill that does."""
        # Coming back takes a margin; leaving does not, or the target would be missed meanwhile.
        margin = 0.0 if self.decision.layout.undivided else self.config.margin
        at = greedy(
            lambda cut: forecast(cut).decode_s <= target_s,
            self._near[Mode.PREFILL],
            len(self._cuts),
        )
        self._near[Mode.PREFILL] = at
        keeps = mixed_s <= target_s * (1.0 - margin)
        layout = self._undivided if keeps else self._cuts[self._steady(at)]
        said = "keeps" if keeps else "would miss"
        steps = forecast(at).at(self._cuts[at])
        reason = f"the mixed step {said} {format_seconds(target_s)} a token: {steps}"
        return layout, forecast(at), reason

    def _by_time_lost(
        self,
        situation: Situation,
        cuts: set[int],
        least_decode_s: float,
        forecast: Callable[[int], Forecast],
    ) -> tuple[Layout, Forecast, str]:
        """Whichever layout loses least time; the present one unless another saves enough."""
        waiting, decoding = situation.waiting, situation.decoding
        alone_s = self.corrections[Phase.DECODE].apply(least_decode_s)

        def apart(cut: int) -> float:
            prefill_s, decode_s, _ = forecast(cut)
            return prefill_s * (waiting + decoding * max(0.0, 1.0 - alone_s / decode_s))

        mixed_s = forecast(self._at).undivided_s
        together = waiting * mixed_s + decoding * max(0.0, mixed_s - alone_s)
        best = min(sorted(cuts), key=apart)
        is_undivided = self.decision.layout.undivided
        present = together if is_undivided else apart(self._at)
        keep, at = present * (1.0 - self.config.margin), self._at
        layout = self.decision.layout
        if apart(best) < min(keep, together):
            layout, at = self._cuts[best], best
        elif together < keep:
            layout, at = self._undivided, best
        elif is_undivided:
            at = best
        self._at = at
        reason = (
            f"{waiting} prompts and {decoding} decoding lose {apart(at):.3g} request-seconds each "
            f"chunk divided, {together:.3g} undivided: {forecast(at).at(self._cuts[at])}"
        )
        return layout, forecast(at), reason

    def _steady(self, at: int) -> int:
        """A cut, or the one before it where the two are too near each other to move."""
        units = [self._cuts[cut].prefill.units for cut in (at, self._at)]
        if abs(units[0] - units[1]) >= self._delta:
            self._at = at
        return self._at
