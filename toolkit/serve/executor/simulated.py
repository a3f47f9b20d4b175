"""Computes nothing: a step moves a virtual clock by what the cost model says it takes.

Two steps may be in flight, on shares that do not overlap. Each goes on at its own speed, which
changes when the other begins or ends: what is left of it is kept as seconds alone, and divided by
how much the other slows it (`CostModel.beside`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from toolkit.errors import UsageError
from toolkit.hardware.share import Share
from toolkit.serve.batch import Batch, StepResult
from toolkit.serve.clock import VirtualClock
from toolkit.serve.request import Phase
from toolkit.serve.split.cost_model import CostModel, Usage
from toolkit.serve.split.work import Load

# What is drawn for every request: no text is simulated, only its length.
TOKEN_ID = 0


@dataclass(slots=True)
class _Flight:
    batch: Batch
    share: Share
    usage: Usage
    left_s: float  # with nothing beside it
    slowdown: float = 1.0


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
            left_s *= self._random.lognormvariate(0.0, self.noise)
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
            tuple(TOKEN_ID if piece.samples else None for piece in slices)
        )

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
