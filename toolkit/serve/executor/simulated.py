"""Computes nothing: a step moves a virtual clock by what the cost model says it takes.

Two steps may be in flight, on shares that do not overlap. Each goes on at its own speed, which
changes when the other begins or ends: what is left of it is kept as seconds alone, and divided by
how much the other slows it (`CostModel.beside`).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from toolkit.errors import UsageError
from toolkit.hardware.share import Share
from toolkit.serve.batch import Batch, StepResult
from toolkit.serve.clock import VirtualClock
from toolkit.serve.request import Phase, Request
from toolkit.serve.split import along
from toolkit.serve.split.cost_model import CostModel, Usage
from toolkit.serve.split.work import Load


@dataclass(slots=True)
class _Flight:
    batch: Batch
    share: Share
    usage: Usage
    left_s: float  # with nothing beside it
    num_tokens: int
    slowdown: float = 1.0


class Ahead(NamedTuple):
    """Decode steps to come: what they hold, what each takes alone, and from when to when it lasts.

    `times_s` are the start of the first and the ends of those steps that end before the one in
    flight beside them, of which `lefts_s` are left after each. `beside_s` is what each takes beside
    `other`, noise aside.
    """

    counts: along.Counts
    alone: along.Run
    times_s: along.Array
    lefts_s: along.Array | None
    other: Usage | None
    beside_s: along.Array | None

    @property
    def num(self) -> int:
        """Steps that end before the one in flight."""
        return len(self.times_s) - 1


class SimulatedExecutor:
    """Runs batches on a virtual clock, one at a time (`run`) or two at once (`begin`, `wait`)."""

    def __init__(
        self,
        clock: VirtualClock,
        cost: CostModel,
        *,
        noise: float = 0.0,
        seed: int = 0,
        handover_s: Callable[[Batch], float] | None = None,
    ) -> None:
        """`noise` is the standard deviation of the logarithm of a step's seconds.

        `handover_s` gives what a batch takes beyond its kernels, such as sending finished prompts'
        KV to another device.
        """
        if noise < 0:
            raise UsageError(f"noise is {noise}; it must be 0 or more")
        self.clock = clock
        self.cost = cost
        self.noise = noise
        self.num_computed = 0
        self.busy_s = 0.0
        self._handover_s = handover_s
        self._seed = seed
        self._random = random.Random(seed)
        # Factors drawn for steps that were priced ahead and have not begun.
        self._drawn: deque[float] = deque()
        self._runs = along.Runs(cost)
        self._whole = Share.whole(cost.device)
        self._flights: list[_Flight] = []

    def start(self) -> None:
        """Nothing is to be made ready."""

    def run(self, batch: Batch) -> StepResult:
        """Compute a batch on the whole device; the clock moves on by what that takes."""
        assert not self._flights, "something is in flight"
        self.begin(batch, self._whole)
        return self.wait()[1]

    def begin(self, batch: Batch, share: Share) -> None:
        """Start a batch on a share."""
        assert all(not share.overlaps(one.share) for one in self._flights), "units computed twice"
        usage, left_s, num_tokens = self._priced(batch, share)
        if self.noise:
            drawn = self._drawn
            left_s *= drawn.popleft() if drawn else self._random.lognormvariate(0.0, self.noise)
        self._flights.append(_Flight(batch, share, usage, left_s, num_tokens))
        self._interfere()

    def wait(self) -> tuple[Batch, StepResult]:
        """Move the clock to the end of the first batch to end; return it and its tokens."""
        assert self._flights, "nothing is in flight"
        first = min(self._flights, key=lambda one: one.left_s * one.slowdown)
        seconds = first.left_s * first.slowdown
        self.clock.advance(seconds)
        self.busy_s += seconds
        self._flights.remove(first)
        for other in self._flights:
            other.left_s = max(0.0, other.left_s - seconds / other.slowdown)
        self._interfere()
        slices = first.batch.slices
        self.num_computed += first.num_tokens
        return first.batch, StepResult(
            tuple(self.token(piece.request) if piece.samples else None for piece in slices)
        )

    def ahead(self, counts: along.Counts, share: Share) -> Ahead:
        """Return when decode steps on `share`, one after another from now on, would end.

        They are as many as end before whatever is in flight, which may be one step of the other
        phase. Nothing changes; see `pass_by`.
        """
        own = self._runs.decoding(counts, share.fraction)
        took_s = own.seconds
        if self.noise:
            while len(self._drawn) < counts.num:
                self._drawn.append(self._random.lognormvariate(0.0, self.noise))
            took_s = took_s * np.fromiter(self._drawn, np.float64, counts.num)
        num, lefts_s, beside_s, other = counts.num, None, None, None
        if self._flights:
            (flight,) = self._flights
            theirs: along.Array = np.ones(num)
            if flight.share.device == share.device:
                assert not share.overlaps(flight.share), "units computed twice"
                other, band = flight.usage, self.cost.bandwidth
                beside_s = along.beside(own, other, band)
                took_s = took_s * (beside_s / own.seconds)
                theirs = along.slowed(other, own, band) / other.seconds
            lefts_s = _running(np.subtract, flight.left_s, took_s / theirs)
            ends_first = lefts_s[:-1] * theirs <= took_s
            num = int(np.argmax(ends_first)) if ends_first.any() else num
            lefts_s = np.maximum(0.0, lefts_s[1:])
        times_s = _running(np.add, self.clock.now(), took_s)[: num + 1]
        return Ahead(counts, own, times_s, lefts_s, other, beside_s)

    def pass_by(self, found: Ahead, first: int, num: int) -> None:
        """Take `num` steps of `found` at once, from `first` on: the clock stands at their end.

        Nothing but the steps before `first` has begun or ended since `ahead`.
        """
        last = first + num
        end_s = float(found.times_s[last])
        self.busy_s += end_s - self.clock.now()
        self.clock.move_to(end_s)
        if self.noise:
            for _ in range(num):
                self._drawn.popleft()
        self.num_computed += int(found.counts.sequences[first:last].sum())
        if found.lefts_s is not None:
            self._flights[0].left_s = float(found.lefts_s[last - 1])

    def token(self, request: Request) -> int:
        """Return what is drawn for a request, always: no text, but no other request says it."""
        return -1 - request.arrival_seq

    def successor(self) -> SimulatedExecutor:
        """Return an executor of the same model and device with nothing in flight."""
        return SimulatedExecutor(
            self.clock, self.cost, noise=self.noise, seed=self._seed, handover_s=self._handover_s
        )

    def close(self) -> None:
        """Forget what is in flight."""
        self._flights.clear()

    def _priced(self, batch: Batch, share: Share) -> tuple[Usage, float, int]:
        """What a batch takes alone: how it uses the device, its seconds with all else, tokens."""
        prefill, decode = Load.of(batch.of(Phase.PREFILL)), Load.of(batch.of(Phase.DECODE))
        phase = None
        if not (prefill and decode):
            phase = Phase.PREFILL if prefill else Phase.DECODE
        both = prefill + decode
        usage = self.cost.alone(both, phase, share.fraction)
        left_s = usage.seconds * (self.cost.mixed_factor if phase is None else 1.0)
        if self._handover_s is not None:
            left_s += self._handover_s(batch)
        return usage, left_s, both.tokens

    def _interfere(self) -> None:
        """Say anew how much each flight slows the other, where they share a memory."""
        for one in self._flights:
            others = [
                two
                for two in self._flights
                if two is not one and two.share.device == one.share.device
            ]
            one.slowdown = (
                self.cost.beside(one.usage, others[0].usage) / one.usage.seconds if others else 1.0
            )


def _running(step: Any, first: float, each: along.Array) -> along.Array:
    """`first`, and what the ufunc `step` makes of it one after another, as single steps would."""
    return np.asarray(step.accumulate(np.concatenate(([first], each))))
