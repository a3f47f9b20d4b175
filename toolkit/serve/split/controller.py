"""Chooses how the device is laid out, step by step, and says why.

Nexus divides always. Here "undivided" is one of the layouts (as in DuetServe, arXiv 2511.04791),
because dividing reads the weights twice and leaves units idle where the load is one-sided. The
choice:

- Whichever loses less time until the present chunk of prompt is done, in request-seconds. All
  waiting prompts lose the chunk's time. A decoding request loses what it could have done alone in
  the meantime, where a step of T_alone gives it a token. Undivided in n steps:

      undivided: waiting * n T_mixed + decoding * n (T_mixed - T_alone)
      divided:   waiting * T_prefill + decoding * T_prefill * (1 - T_alone / T_decode)

  A long queue so makes for undivided steps, which get through the most tokens; many decoding
  requests beside a few long prompts make for a division.
- With a target for the time between tokens, only what keeps it is weighed: cuts that leave decode
  enough, and undivided steps with no more of a prompt than they have time for (`Decision.chunk`:
  a share of time, where a cut is a share of units; Sarathi-Serve's budget, arXiv 2403.02310, found
  by the cost model). A target that decoding alone could not keep is not held against a layout:
  twice what it takes alone is always allowed.

Divisions come from Nexus's search (`search.py`): the cut of either mode is weighed. With the
paper's slacks the two can contradict each other, and then "decode first" leaves decode fewer units
than "prefill first" does, because each mode keeps the other phase's slack. Told never to undivide,
the controller does as the paper says; else the KV cache being full leaves only the cut that is
better for decode. Against toggling: a change must save `margin` of what is predicted without it (a
Nexus cut: move by `delta`), and nothing changes within `dwell_s` of the last change. Times are
arguments; nothing here reads a clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from toolkit.errors import InfeasibleError, UsageError
from toolkit.serve.request import Phase
from toolkit.serve.split import layouts
from toolkit.serve.split.cost_model import CostModel
from toolkit.serve.split.layouts import Layout
from toolkit.serve.split.predictor import Predictor
from toolkit.serve.split.search import Mode, SearchConfig, greedy, search
from toolkit.serve.split.weighing import CHUNKS, Seconds, Situation, Weighing
from toolkit.serve.split.work import Load
from toolkit.units import format_seconds

# A kind of step that is not made any more is believed to be as fast, beside its prediction, as
# those that are: within so many seconds two thirds of the way.
_FORGET_S = 5.0


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
    """A layout, since when it holds, and why, in a sentence for people.

    `chunk` is how many tokens of prompts an undivided step may hold beside decoding requests; None
    is as many as fit.
    """

    layout: Layout
    since_s: float
    reason: str
    mode: Mode = Mode.PREFILL
    forecast: Forecast | None = None
    chunk: int | None = None


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

    @property
    def decision(self) -> Decision:
        """What holds now, and the newest reason for it."""
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

    def observe(self, own: Phase | None, model_s: float, measured_s: float) -> float:
        """Take in what a step took that `predict` had said would take `model_s`.

        Returns what was expected of it, everything known before it counted in.
        """
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


class Fixed(Predictor):
    """Always the same layout: the undivided engine, a static split, or two devices."""

    def __init__(self, cost: CostModel, layout: Layout) -> None:
        super().__init__(cost)
        self.decision = Decision(layout, 0.0, f"{layout}, as told")

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return (self.decision.layout,)

    @property
    def history(self) -> Sequence[Decision]:
        return (self.decision,)

    def decide(self, look: Callable[[], Situation], now: float) -> Decision:
        """Return the layout."""
        return self.decision

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
        self._counts: dict[Phase | None, int] = {}
        self._forgot_s = 0.0
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
        target_s, early = self.config.tbt_target_s, now - self._changed_s < self.config.dwell_s
        before_s, self._looked_s, situation = self._looked_s, now, look()
        self._forget(now)
        if not (situation.prefill and situation.decode):
            if target_s is not None:
                # The first step that holds both must be held to its time.
                self._looked_s = before_s
            return self.decision
        if early or not self._cuts:
            # How much of a prompt a step holds is no change of layout.
            if target_s is not None:
                chunk = self._chunk(situation, self._allowed_s(situation))[0]
                self.decision = replace(self.decision, chunk=chunk)
            return self.decision
        self._mode = self.config.search.mode(situation.kv_usage, self._mode)
        layout, forecast, reason, chunk = self._choose(situation)
        changes = layout is not self.decision.layout
        since_s = now if changes else self.decision.since_s
        self.decision = Decision(layout, since_s, reason, self._mode, forecast, chunk)
        if changes:
            self._changed_s = now
            self.num_changes += 1
            self.history.append(self.decision)
        return self.decision

    def rests(self, now: float) -> bool:
        """Return whether it is too early to look again, or to change where that is all there is."""
        if now - self._looked_s < self.config.interval_s:
            return True
        early = now - self._changed_s < self.config.dwell_s
        return self.config.tbt_target_s is None and (early or not self._cuts)

    def _forget(self, now: float) -> None:
        """Let the corrections of steps that are not made drift to those of steps that are.

        A slow minute would else be held for ever against the layout that it fell on.
        """
        counts = {kind: each.num_observed for kind, each in self.corrections.items()}
        fresh = [
            each.ratio
            for kind, each in self.corrections.items()
            if counts[kind] > self._counts.get(kind, 0)
        ]
        if fresh:
            part = 1.0 - math.exp(-min(1.0, (now - self._forgot_s) / _FORGET_S))
            for kind, each in self.corrections.items():
                if counts[kind] == self._counts.get(kind, 0):
                    each.drift(sum(fresh) / len(fresh), part)
            self._counts, self._forgot_s = counts, now

    def _allowed_s(self, situation: Situation) -> float:
        """The seconds a token may take: as promised, or twice what decoding takes by itself."""
        assert self.config.tbt_target_s is not None
        alone_s = self.cost.alone(situation.decode, Phase.DECODE).seconds
        return max(self.config.tbt_target_s, 2.0 * self.corrections[Phase.DECODE].apply(alone_s))

    def _chunk(self, situation: Situation, allowed_s: float | None) -> tuple[int | None, float]:
        """How much of a prompt a mixed step has time for, and its predicted seconds.

        Without a limit all there is (None). Where not even the least keeps it, the least.
        """

        def seconds(tokens: int) -> float:
            part = situation.prefill.first(tokens)
            return self.corrections[None].apply(self.cost.undivided(part, situation.decode))

        whole = situation.prefill.tokens
        if allowed_s is None or seconds(whole) <= allowed_s:
            return None, seconds(whole)
        sizes = [size for size in CHUNKS if size < whole] or [whole]
        at = greedy(lambda i: seconds(sizes[i]) <= allowed_s, len(sizes) // 2, len(sizes))
        return sizes[at], seconds(sizes[at])

    def _choose(self, situation: Situation) -> tuple[Layout, Forecast, str, int | None]:
        """Return the layout, what it is expected to take, why, and the decision's chunk."""
        cost, config = self.cost, self.config
        allowed_s = None
        if config.may_undivide and config.tbt_target_s is not None:
            allowed_s = self._allowed_s(situation)
        chunk, mixed_s = self._chunk(situation, allowed_s)
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
            reason = f"{self._mode.value}: {forecast(at).at(self._cuts[at])}"
            return self._cuts[at], forecast(at), reason, None
        if allowed_s is None:
            cuts = {found(mode) for mode in Mode}
            if self._mode is Mode.DECODE:
                cuts = {min(cuts)}
        else:
            near = self._near[Mode.PREFILL]
            keeps = greedy(lambda cut: forecast(cut).decode_s <= allowed_s, near, len(self._cuts))
            self._near[Mode.PREFILL] = keeps
            cuts = {keeps}
        weighing = Weighing(
            situation,
            chunk,
            mixed_s,
            self.corrections[Phase.DECODE].apply(least[Phase.DECODE]),
            allowed_s,
            lambda cut: Seconds(*forecast(cut)[:2]),
        )
        present = None if self.decision.layout.undivided else self._at
        chosen = weighing.choose(sorted(cuts), present, config.margin)
        # Of cuts not taken the best is told.
        self._at = min(sorted(cuts), key=weighing.apart_s) if chosen is None else chosen
        layout = self._undivided if chosen is None else self._cuts[chosen]
        said = f"{weighing.said(self._at)}: {forecast(self._at).at(self._cuts[self._at])}"
        return layout, forecast(self._at), said, chunk

    def _steady(self, at: int) -> int:
        """A cut, or the one before it where the two are too near each other to move."""
        units = [self._cuts[cut].prefill.units for cut in (at, self._at)]
        if abs(units[0] - units[1]) >= self._delta:
            self._at = at
        return self._at
