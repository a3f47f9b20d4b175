"""Computes nothing: a step moves a virtual clock by what the cost model says it takes.

Two steps may be in flight, on shares that do not overlap. Each goes on at its own speed, which
changes when the other begins or ends: what is left of it is kept as seconds alone, and divided by
how much the other slows it (`CostModel.beside`).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    slowdown: float = 1.0


@dataclass(frozen=True, slots=True)
class Ahead:
    """Decode steps to come: how many sequences they hold, what each takes alone and in fact.

    `num` were priced; `seconds` are of those that end before the step in flight beside them, and
    `lefts_s` is what is left of that after each.
    """

    sequences: int
    num: int
    alone: along.Stretch
    seconds: Sequence[float]
    lefts_s: Sequence[float]


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
        usage, left_s = self._priced(batch, share)
        if self.noise:
            self._draw(1)
            left_s *= self._drawn.popleft()
        self._flights.append(_Flight(batch, share, usage, left_s))
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
        self.num_computed += sum(piece.num_tokens for piece in slices)
        return first.batch, StepResult(
            tuple(self.token(piece.request) if piece.samples else None for piece in slices)
        )

    def ahead(self, sequences: int, context: int, num: int, share: Share) -> Ahead:
        """Return what up to `num` decode steps on `share`, one after another, would take.

        They are as many as end before whatever is in flight, which may be one step of the other
        phase. Nothing changes; see `pass_by`.
        """
        own = along.decoding(self.cost, sequences, context, num, Phase.DECODE, share.fraction)
        alone_s = along.each(own.seconds, num)
        if self.noise:
            self._draw(num)
            alone_s = [one * factor for one, factor in zip(alone_s, self._drawn, strict=False)]
        if not self._flights:
            return Ahead(sequences, num, own, tuple(alone_s), ())
        (flight,) = self._flights
        mine = theirs = [1.0] * num
        if flight.share.device == share.device:
            assert not share.overlaps(flight.share), "units computed twice"
            other, band = along.of(flight.usage), self.cost.bandwidth
            mine = along.each(along.beside(own, other, band) / own.seconds, num)
            theirs = along.each(along.beside(other, own, band) / flight.usage.seconds, num)
        took, lefts, left_s = [], [], flight.left_s
        for one, my_slowdown, their_slowdown in zip(alone_s, mine, theirs, strict=True):
            seconds = one * my_slowdown
            if left_s * their_slowdown <= seconds:
                break
            left_s = max(0.0, left_s - seconds / their_slowdown)
            took.append(seconds)
            lefts.append(left_s)
        return Ahead(sequences, num, own, tuple(took), tuple(lefts))

    def pass_by(self, found: Ahead, num: int) -> None:
        """Take the first `num` steps of `found` at once: the clock stands at the end of the last.

        Nothing has begun or ended since `ahead`.
        """
        for seconds in found.seconds[:num]:
            self.clock.advance(seconds)
            self.busy_s += seconds
            if self.noise:
                self._drawn.popleft()
        self.num_computed += num * found.sequences
        if found.lefts_s:
            self._flights[0].left_s = found.lefts_s[num - 1]

    def token(self, request: Request) -> int:
        """Return what is drawn for a request, always: no text, but no other request says it."""
        return -1 - request.arrival_seq

    def _draw(self, num: int) -> None:
        while len(self._drawn) < num:
            self._drawn.append(self._random.lognormvariate(0.0, self.noise))

    def successor(self) -> SimulatedExecutor:
        """Return an executor of the same model and device with nothing in flight."""
        return SimulatedExecutor(
            self.clock, self.cost, noise=self.noise, seed=self._seed, handover_s=self._handover_s
        )

    def close(self) -> None:
        """Forget what is in flight."""
        self._flights.clear()

    def _priced(self, batch: Batch, share: Share) -> tuple[Usage, float]:
        """What a batch takes alone: how it uses the device, and its seconds with all else."""
        prefill, decode = (Load.of(batch.of(phase)) for phase in (Phase.PREFILL, Phase.DECODE))
        phase = None
        if not (prefill and decode):
            phase = Phase.PREFILL if prefill else Phase.DECODE
        usage = self.cost.alone(prefill + decode, phase, share.fraction)
        left_s = usage.seconds * (self.cost.mixed_factor if phase is None else 1.0)
        if self._handover_s is not None:
            left_s += self._handover_s(batch)
        return usage, left_s

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
