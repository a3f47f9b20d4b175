"""Seconds of a piece of Work on a device, or on a share of it.

    seconds = overhead + max(flops / (e C g(r)), bytes / (m B h(r)))

C, B are the device's peaks; e, m the part of them that an op class reaches; r the share. g and h
describe how a share scales: proportional up to a saturation point R, then with slope lambda
(the continuous, never increasing form of Nexus, arXiv 2507.06608, section 4):

    g(r) = s(r) / s(1),   s(r) = r for r <= R,   R + lambda (r - R) beyond.

Because the overhead is paid however small the work, the rate of a small operator is
F / (F + F_half) of the plateau with F_half = overhead x e C (the half-performance length of Hockney
and Jesshope, "Parallel Computers", 1981), so small matrices do not reach the peak.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from toolkit.cost.work import OpClass, Work
from toolkit.errors import UsageError
from toolkit.hardware.device import Device
from toolkit.hardware.share import Share

if TYPE_CHECKING:
    from toolkit.cost.calibration import Calibration

# Classes whose arithmetic runs on matrix units; the others run at the vector rate.
MATRIX_CLASSES = ("matmul", "attention", "conv")


@dataclass(frozen=True)
class Saturation:
    """How a rate grows with the share: R and lambda above; (1, 1) is proportional."""

    point: float = 1.0
    slope: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.point <= 1 or not 0 <= self.slope <= 1:
            raise UsageError(
                f"saturation needs 0 < point <= 1 and 0 <= slope <= 1, not {self.point}, "
                f"{self.slope}"
            )

    def scale(self, share: float) -> float:
        """Return the rate at `share` relative to the whole device's.

        >>> Saturation(0.5, 0.0).scale(0.5), Saturation(0.5, 0.0).scale(0.25)
        (1.0, 0.5)
        """
        return self._raw(share) / self._raw(1.0)

    def _raw(self, share: float) -> float:
        return min(share, self.point) + self.slope * max(0.0, share - self.point)


@dataclass(frozen=True)
class Coefficients:
    """What an op class reaches on a device: parts of the peaks, and seconds per operator."""

    compute_efficiency: float
    memory_efficiency: float
    overhead_s: float
    compute_saturation: Saturation = Saturation()
    memory_saturation: Saturation = Saturation()


# (compute, memory) efficiency of the best op class, by kind of device, against catalogue peaks.
# cuda: large cuBLAS GEMMs reach 70 to 80 % of the dense peak on A100 and H100, copies 85 to 90 % of
# HBM. rocm: public MI300X training reports put linears at 40 to 50 % of the peak. cpu: a catalogue
# row's clock and two FMA ports are seldom both had. measured: the row's peaks *are* what a large
# GEMM and a read reach. All are starting points for calibration, and say so wherever shown.
_REACH = {
    "cuda": (0.75, 0.85), "rocm": (0.5, 0.8), "cpu": (0.7, 0.8), "measured": (1.0, 1.0),
}  # fmt: skip
# What each class reaches of that. Fused attention interleaves matrix and vector work; gathers and
# scatters touch scattered lines; reductions leave part of the device idle at the end.
_CLASS_REACH: dict[OpClass, tuple[float, float]] = {
    "matmul": (1.0, 1.0), "attention": (0.6, 0.9), "conv": (0.8, 0.9), "norm": (0.8, 0.9),
    "elementwise": (0.8, 1.0), "reduction": (0.8, 0.9), "gather": (0.8, 0.6),
    "scatter": (0.8, 0.4), "copy": (0.8, 1.0), "view": (1.0, 1.0),
}  # fmt: skip
# Filling the pipeline of a matrix kernel (tiles, waves) on top of its launch; others start at once.
_RAMP_S = {"cuda": 3e-6, "rocm": 4e-6, "cpu": 2e-6}
# From Nexus's measurements on an L20 (arXiv 2507.06608, section 3): prefill gains over 25 % from 30
# to 40 % of the SMs and about 10 % from 70 to 80 %, hence R = 0.6, lambda = 0.75; decode gains
# about 10 % from 30 to 40 % and under 3 % a step beyond 50 %, hence R = 0.35, lambda = 0.1. CPU
# cores scale GEMMs; half of them draw most of the memory bandwidth (an assumption).
_SATURATION = {
    "cuda": (Saturation(0.6, 0.75), Saturation(0.35, 0.1)),
    "rocm": (Saturation(0.6, 0.75), Saturation(0.35, 0.1)),
    "cpu": (Saturation(), Saturation(0.5, 0.2)),
}


def default_coefficients(op_class: OpClass, device: Device) -> Coefficients:
    """Return the uncalibrated coefficients of a class on a device."""
    compute, memory = _REACH["measured" if device.measured else device.kind]
    class_compute, class_memory = _CLASS_REACH[op_class]
    ramp_s = _RAMP_S[device.kind] if op_class in MATRIX_CLASSES else 0.0
    measured = len(device.unit_rates) > 1
    saturations = _measured_saturation(device) if measured else _SATURATION[device.kind]
    compute_saturation, memory_saturation = saturations
    return Coefficients(
        compute * class_compute,
        memory * class_memory,
        device.launch_overhead_s + ramp_s,
        compute_saturation,
        memory_saturation,
    )


@functools.lru_cache(maxsize=256)
def _measured_saturation(device: Device) -> tuple[Saturation, Saturation]:
    """How compute and memory scale, as the device's rates at fewer units say."""
    flops = [(rate.num_units, rate.peak_flops["float32"]) for rate in device.unit_rates]
    reads = [(rate.num_units, rate.memory_bandwidth) for rate in device.unit_rates]
    return _nearest_saturation(flops), _nearest_saturation(reads)


def _nearest_saturation(rates: list[tuple[int, float]]) -> Saturation:
    """The saturation whose scale is nearest to (units, rate) points, by squared difference."""
    whole, full_rate = max(rates)
    points = [(units / whole, rate / full_rate) for units, rate in rates]

    def distance(one: Saturation) -> float:
        return sum((one.scale(share) - rate) ** 2 for share, rate in points)

    slopes = [step / 50 for step in range(51)]
    return min((Saturation(share, slope) for share, _ in points for slope in slopes), key=distance)


@dataclass(frozen=True)
class Estimate:
    """Predicted seconds of one piece of work, and what they consist of."""

    seconds: float
    compute_s: float
    memory_s: float
    overhead_s: float

    @property
    def bound(self) -> Literal["compute", "memory", "overhead", "nothing"]:
        """What takes most of the time."""
        if self.seconds == 0:
            return "nothing"
        if self.overhead_s > max(self.compute_s, self.memory_s):
            return "overhead"
        return "compute" if self.compute_s >= self.memory_s else "memory"


def estimate(
    work: Work,
    device: Device,
    *,
    share: Share | None = None,
    calibration: Calibration | None = None,
) -> Estimate:
    """Predict `work` on a device, or on `share` of it; see the head of this file.

    Raises UsageError when the device has no peak for the work's dtype, or the share or the
    calibration is another device's.
    """
    if work.op_class == "view":
        return Estimate(0.0, 0.0, 0.0, 0.0)
    if share is not None and share.device != device:
        raise UsageError(f"the share is one of {share.device.name}, not of {device.name}")
    found = calibration.coefficients(work.op_class, device) if calibration else None
    coefficients = found or default_coefficients(work.op_class, device)
    return evaluate(work, device, coefficients, share.fraction if share else 1.0)


def seconds(
    work: Work,
    device: Device,
    *,
    share: Share | None = None,
    calibration: Calibration | None = None,
) -> float:
    """Predict the seconds of `work` on a device or a share of it.

    >>> from toolkit.hardware import find_device
    >>> gemm = Work("matmul", flops=2 * 8192**3, read_bytes=2**28, write_bytes=2**27,
    ...             dtype="bfloat16")
    >>> 1.1e-3 < seconds(gemm, find_device("h100")) < 2e-3
    True
    """
    return estimate(work, device, share=share, calibration=calibration).seconds


def arithmetic_peak(work: Work, device: Device) -> float:
    """Return the FLOP/s peak that bounds this work: matrix units by dtype, else the vector rate."""
    matrix = work.op_class in MATRIX_CLASSES
    return device.peak(work.dtype) if matrix else device.vector_flops


def evaluate(work: Work, device: Device, coefficients: Coefficients, share: float) -> Estimate:
    """Apply the formula at the head of this file for given coefficients and share in (0, 1]."""
    if not 0 < share <= 1:
        raise UsageError(f"a share of a device is in (0, 1], not {share}")
    compute_s = memory_s = 0.0
    if work.flops:
        rate = arithmetic_peak(work, device) * coefficients.compute_efficiency
        compute_s = work.flops / (rate * coefficients.compute_saturation.scale(share))
    if work.moved_bytes:
        rate = device.memory_bandwidth * coefficients.memory_efficiency
        memory_s = work.moved_bytes / (rate * coefficients.memory_saturation.scale(share))
    overhead_s = coefficients.overhead_s
    return Estimate(overhead_s + max(compute_s, memory_s), compute_s, memory_s, overhead_s)
