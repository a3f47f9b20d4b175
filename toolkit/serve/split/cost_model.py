"""Seconds of a phase's step on a share of the device, alone and beside the other phase.

After Nexus (arXiv 2507.06608 v5, section 4.1). On the share r of the device's units a kernel takes

    overhead + max(flops / (e C g(r)), bytes / (m B h(r)))

with g and h the saturation-decay curves of `cost.roofline`: proportional up to a point, then with a
smaller slope, continuous and never decreasing. A phase may have coefficients of its own.

Both phases draw on one memory. A step consists of attention, which moves w_a bytes a second, of
dense kernels, which move w_d, and of overhead, which moves none; P_a, P_d and P_o are their parts
of its time. Where two segments together ask for more than the bandwidth B, each gets what it asked
for in proportion:

    slowdown(w, w') = max(1, (w + w') / B)
    seconds' of a segment = seconds / (P_a' / slowdown(w, w_a') + P_d' / slowdown(w, w_d') + P_o')

with the other phase's P' and w' as they are alone, so nothing is circular. This is Nexus's
B_decode, with two changes. It compares bytes of two whole batches, which says the same only where
both take equally long: here they are bytes a second. And it slows decode's attention alone; here
every segment of either phase is slowed, because in a simulator bandwidth that one phase got must be
missing to the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from toolkit.cost import roofline
from toolkit.cost.calibration import Calibration
from toolkit.cost.roofline import Coefficients
from toolkit.cost.work import OpClass, Work
from toolkit.errors import UsageError
from toolkit.hardware.device import Device
from toolkit.serve.request import Phase
from toolkit.serve.split.sharded import Exchange
from toolkit.serve.split.work import Load, ModelWork, PerCount

Profile = Mapping[OpClass, Coefficients]


class Segment(NamedTuple):
    """A part of a step: seconds when nothing runs beside it, and the bytes it moves."""

    seconds: float
    moved_bytes: float

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.moved_bytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Usage:
    """What a step takes alone: attention, dense kernels, and time that moves nothing."""

    attention: Segment
    dense: Segment
    overhead_s: float

    @property
    def seconds(self) -> float:
        """The step's seconds with nothing beside it."""
        return self.attention.seconds + self.dense.seconds + self.overhead_s


NOTHING = Usage(Segment(0.0, 0.0), Segment(0.0, 0.0), 0.0)


@dataclass(frozen=True)
class StepOverhead:
    """Seconds a step takes outside its kernels: always, and for every sequence in it.

    The defaults are those fitted for vLLM on A100 and H100 by BLIS (inference-sim, its latency
    model): 126 us a step and 4 us a sequence.
    """

    per_step_s: float = 126e-6
    per_sequence_s: float = 4e-6


class _Priced(NamedTuple):
    """A kernel on a share: seconds of its arithmetic and of its traffic, linear in the load."""

    is_attention: bool
    compute: tuple[float, ...]  # in the order of PerCount's fields
    memory: tuple[float, ...]


class Prices(NamedTuple):
    """All kernels on a share, and the bytes and launches of a step, which depend on no share."""

    kernels: tuple[_Priced, ...]
    attention_bytes: PerCount
    dense_bytes: PerCount
    launches_s: float


class CostModel:
    """Prices steps of one model on one device. Everything it returns is predicted, in seconds."""

    def __init__(
        self,
        model: ModelWork,
        device: Device,
        *,
        calibration: Calibration | None = None,
        profiles: Mapping[Phase | None, Profile] | None = None,
        overhead: StepOverhead | None = None,
        exchange: Exchange | None = None,
        mixed_factor: float = 1.0,
        bandwidth: float | None = None,
    ) -> None:
        """`profiles` replace, for a phase (None: a step of both), the coefficients of the op
        classes named in them; `bandwidth` is what two phases side by side draw on, by default
        what products reach of the device's; `exchange` is what a model shared by several devices
        adds to a step (see `sharded.py`).

        `mixed_factor` is how much longer a step that computes both phases takes than its kernels
        say: 1 where the engine's kernels lose nothing on such a batch. Nexus reports 0.251 s for
        mixed steps of vLLM where prefill and decode alone took 0.132 and 0.015 s (its section 3).
        """
        if mixed_factor < 1:
            raise UsageError(f"a mixed step takes {mixed_factor} of its kernels' time: 1 or more")
        self.model = model
        self.device = device
        self.overhead = overhead or StepOverhead()
        self.mixed_factor = mixed_factor
        self.exchange = exchange
        self._calibration = calibration
        self._profiles = profiles or {}
        self._prices: dict[tuple[Phase | None, float], Prices] = {}
        self._known: dict[tuple[Phase | None, float], tuple[Load, Usage]] = {}
        self.bandwidth = bandwidth or (
            device.memory_bandwidth * self._coefficients("matmul", None).memory_efficiency
        )

    def alone(self, load: Load, phase: Phase | None = None, share: float = 1.0) -> Usage:
        """Return what a step takes on `share` (0 to 1] of the units with nothing beside it.

        `phase` chooses the profile; None is a step that may hold both phases. An empty load takes
        nothing.
        """
        if not load:
            return NOTHING
        # A chunk of prompt outlasts many looks of a controller, which asks for the same again.
        known = self._known.get((phase, share))
        if known is not None and known[0] is load:
            return known[1]
        usage = self._usage(load, self.prices(phase, share))
        self._known[phase, share] = (load, usage)
        return usage

    def _usage(self, load: Load, prices: Prices) -> Usage:
        n, t, c, p, d = load.sequences, load.tokens, load.context, load.pairs, load.samples
        attention_s = dense_s = 0.0
        # Written out: this is asked at every step, and several times for a decision.
        for is_attention, (f0, fn, ft, fc, fp, fd), (m0, mn, mt, mc, mp, md) in prices.kernels:
            compute_s = f0 + fn * n + ft * t + fc * c + fp * p + fd * d
            memory_s = m0 + mn * n + mt * t + mc * c + mp * p + md * d
            if is_attention:
                attention_s += max(compute_s, memory_s)
            else:
                dense_s += max(compute_s, memory_s)
        overhead_s = self.overhead.per_step_s + n * self.overhead.per_sequence_s
        overhead_s += prices.launches_s
        if self.exchange is not None:
            overhead_s += self.exchange.seconds(load)
        return Usage(
            Segment(attention_s, prices.attention_bytes.at(load)),
            Segment(dense_s, prices.dense_bytes.at(load)),
            overhead_s,
        )

    def undivided(self, prefill: Load, decode: Load) -> float:
        """Return the seconds of one step on the whole device that computes both loads."""
        factor = self.mixed_factor if prefill and decode else 1.0
        return factor * self.alone(prefill + decode).seconds

    def beside(self, own: Usage, other: Usage) -> float:
        """Return the seconds of `own` while steps like `other` run beside it all the time."""
        total_s = other.seconds
        if not total_s:
            return own.seconds
        idle = other.overhead_s / total_s
        attention, dense = other.attention, other.dense
        part, dense_part = attention.seconds / total_s, dense.seconds / total_s
        rate, dense_rate, bandwidth = attention.rate, dense.rate, self.bandwidth
        seconds = own.overhead_s
        for segment in (own.attention, own.dense):
            if segment.seconds:
                mine = segment.rate
                kept = part / max(1.0, (mine + rate) / bandwidth)
                kept += dense_part / max(1.0, (mine + dense_rate) / bandwidth)
                seconds += segment.seconds / (idle + kept)
        return seconds

    def divided(self, prefill: Load, decode: Load, prefill_share: float) -> tuple[float, float]:
        """Return (prefill's, decode's) seconds, side by side, decode on what prefill leaves."""
        first = self.alone(prefill, Phase.PREFILL, prefill_share)
        second = self.alone(decode, Phase.DECODE, 1.0 - prefill_share)
        return self.beside(first, second), self.beside(second, first)

    def decode_bandwidth(self, prefill: Usage, decode: Usage) -> float:
        """Return the bytes a second that decode's attention gets beside `prefill` (B_decode)."""
        attention = Usage(decode.attention, Segment(0.0, 0.0), 0.0)
        seconds = self.beside(attention, prefill)
        return decode.attention.moved_bytes / seconds if seconds else self.bandwidth

    def prices(self, phase: Phase | None, share: float) -> Prices:
        """Return every kernel's price on `share`, with the profile of `phase`."""
        known = self._prices.get((phase, share))
        if known is None:
            known = self._prices[phase, share] = self._priced(phase, share)
        return known

    def _priced(self, phase: Phase | None, share: float) -> Prices:
        kernels, launches_s = [], 0.0
        light: tuple[float, ...] = PerCount().terms
        moved = {True: PerCount(), False: PerCount()}
        for kernel in self.model.kernels:
            found = self._coefficients(kernel.op_class, phase)
            # One FLOP and one byte, priced by the roofline itself.
            flop = Work(kernel.op_class, flops=1.0, dtype=kernel.dtype)
            byte = Work(kernel.op_class, read_bytes=1.0, dtype=kernel.dtype)
            per_flop = roofline.evaluate(flop, self.device, found, share).compute_s
            per_byte = roofline.evaluate(byte, self.device, found, share).memory_s
            is_attention = kernel.op_class == "attention"
            compute = kernel.flops.scaled(kernel.count * per_flop).terms
            memory = kernel.moved_bytes.scaled(kernel.count * per_byte).terms
            if not is_attention and all(c <= m for c, m in zip(compute, memory, strict=True)):
                # Bound by memory whatever the load: such kernels are one.
                light = tuple(a + m for a, m in zip(light, memory, strict=True))
            else:
                kernels.append(_Priced(is_attention, compute, memory))
            moved[is_attention] += kernel.moved_bytes.scaled(kernel.count)
            launches_s += kernel.count * found.overhead_s
        kernels.append(_Priced(False, PerCount().terms, light))
        return Prices(tuple(kernels), moved[True], moved[False], launches_s)

    def _coefficients(self, op_class: OpClass, phase: Phase | None) -> Coefficients:
        if op_class in self._profiles.get(phase, {}):
            return self._profiles[phase][op_class]
        fitted = self._calibration and self._calibration.coefficients(op_class, self.device)
        return fitted or roofline.default_coefficients(op_class, self.device)
