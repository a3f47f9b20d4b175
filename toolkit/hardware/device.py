"""Device: what one accelerator, or one CPU, can do at most."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from toolkit.errors import UsageError

Kind = Literal["cpu", "cuda", "rocm"]

# The types arithmetic runs in. "tf32" is float32 data on tensor cores; "float8" covers e4m3 and
# e5m2; "int8" accumulates in 32 bits.
DTYPES = ("float64", "float32", "tf32", "float16", "bfloat16", "float8", "int8")
_ALIASES = {
    "fp64": "float64", "double": "float64",
    "fp32": "float32", "float": "float32",
    "fp16": "float16", "half": "float16",
    "bf16": "bfloat16",
    "fp8": "float8", "float8_e4m3fn": "float8", "float8_e5m2": "float8",
    "qint8": "int8", "uint8": "int8",
}  # fmt: skip


def canonical_dtype(name: str) -> str:
    """Return the catalogue's name for a type as torch or people write it.

    >>> canonical_dtype("torch.bfloat16"), canonical_dtype("fp32")
    ('bfloat16', 'float32')
    """
    plain = name.removeprefix("torch.")
    return _ALIASES.get(plain, plain)


@dataclass(frozen=True)
class UnitRate:
    """Measured rates when only `num_units` units of a device work (a thread count, on a CPU)."""

    num_units: int
    peak_flops: Mapping[str, float] = field(hash=False)
    memory_bandwidth: float


@dataclass(frozen=True)
class DiskRead:
    """Measured direct reads of one size, in random or file order, `num_readers` at a time."""

    num_bytes: int
    pattern: Literal["random", "sequential"]
    num_readers: int
    bandwidth: float
    median_latency_s: float


@dataclass(frozen=True)
class Disk:
    """Measured rates of the disk under a folder."""

    folder: str
    reads: tuple[DiskRead, ...]
    write_bandwidth: float | None = None  # buffered, up to the end of fsync; None: not measured

    def read_bandwidth(self, num_bytes: int, *, num_readers: int = 1) -> float | None:
        """Return the measured B/s of random reads, or None where that was not measured."""
        for read in self.reads:
            if (read.pattern, read.num_bytes, read.num_readers) == (
                "random", num_bytes, num_readers,
            ):  # fmt: skip
                return read.bandwidth
        return None


@dataclass(frozen=True)
class Device:
    """One accelerator or CPU. Rates are dense peaks (no sparsity) in SI; `source` says whose.

    `unit_granularity` is (smallest slice, slices are multiples of) in units: SMs, CUs or cores.
    `host_bandwidth` is what pinned copies over PCIe reach, per direction. `unit_rates` holds
    measurements at fewer units, where there are any; a catalogue row has none.
    """

    name: str
    kind: Kind
    memory_bytes: int
    memory_bandwidth: float
    peak_flops: Mapping[str, float] = field(hash=False)
    num_units: int
    unit_granularity: tuple[int, int]
    launch_overhead_s: float
    source: str
    title: str = ""
    l2_bytes: int = 0
    pcie_generation: int | None = None
    host_bandwidth: float = math.inf
    compute_capability: str | None = None
    measured: bool = False
    unit_rates: tuple[UnitRate, ...] = ()
    disk: Disk | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UsageError(
                f"device {self.name!r}: kind {self.kind!r} is unknown",
                remedy=f"use one of: {', '.join(get_args(Kind))}",
            )
        positive = {
            "memory_bytes": self.memory_bytes,
            "memory_bandwidth": self.memory_bandwidth,
            "num_units": self.num_units,
            "host_bandwidth": self.host_bandwidth,
            **{f"peak_flops.{dtype}": rate for dtype, rate in self.peak_flops.items()},
        }
        for what, value in positive.items():
            if not value > 0:
                raise UsageError(f"device {self.name!r}: {what} must be positive, not {value}")
        if self.launch_overhead_s < 0:
            raise UsageError(f"device {self.name!r}: launch_overhead_s must not be negative")
        unknown = sorted(set(self.peak_flops) - set(DTYPES))
        if unknown or "float32" not in self.peak_flops:
            raise UsageError(
                f"device {self.name!r}: peak_flops needs float32 and may name only "
                f"{', '.join(DTYPES)}" + (f", not {', '.join(unknown)}" if unknown else "")
            )
        smallest, multiple = self.unit_granularity
        if not 1 <= multiple <= self.num_units or not 1 <= smallest <= self.num_units:
            raise UsageError(
                f"device {self.name!r}: unit_granularity {self.unit_granularity} does not fit "
                f"{self.num_units} units"
            )

    def peak(self, dtype: str) -> float:
        """Return the dense peak in FLOP/s of matrix arithmetic in `dtype`; UsageError if none."""
        name = canonical_dtype(dtype)
        if name not in self.peak_flops:
            raise UsageError(
                f"{self.name} has no {name} peak", remedy=f"it has: {', '.join(self.peak_flops)}"
            )
        return self.peak_flops[name]

    @property
    def vector_flops(self) -> float:
        """FLOP/s outside the matrix units: what element-wise work and reductions run at."""
        return self.peak_flops["float32"]

    def sliced(self, num_units: int, *, memory_share: float | None = None) -> Device:
        """Return the device that `num_units` of the units make, alone on their part.

        Compute scales with the units, or follows the measurement at that many units. Memory is
        divided by `memory_share` (default: the units' share). Bandwidth is that of the units
        working alone when measured, else the whole device's: contention is not a property of one
        slice.
        """
        if not 1 <= num_units <= self.num_units:
            raise UsageError(
                f"cannot take {num_units} units of {self.name}, which has {self.num_units}"
            )
        if num_units == self.num_units and memory_share is None:
            return self
        share = num_units / self.num_units
        rates = self._rates_at(num_units)
        flops = {dtype: rate * share for dtype, rate in self.peak_flops.items()}
        if rates:
            flops |= dict(rates.peak_flops)
        memory = self.memory_bytes * (share if memory_share is None else memory_share)
        smallest, multiple = self.unit_granularity
        return replace(
            self,
            memory_bytes=max(1, int(memory)),
            memory_bandwidth=rates.memory_bandwidth if rates else self.memory_bandwidth,
            peak_flops=flops,
            num_units=num_units,
            unit_granularity=(min(smallest, num_units), min(multiple, num_units)),
            unit_rates=tuple(rate for rate in self.unit_rates if rate.num_units <= num_units),
        )

    def _rates_at(self, num_units: int) -> UnitRate | None:
        """The measured rates at `num_units`, between two measurements on the line through them."""
        ordered = sorted(self.unit_rates, key=lambda rate: rate.num_units)
        below = [rate for rate in ordered if rate.num_units <= num_units]
        above = [rate for rate in ordered if rate.num_units >= num_units]
        if not below or not above:
            return None
        low, high = below[-1], above[0]
        gap = high.num_units - low.num_units
        part = (num_units - low.num_units) / gap if gap else 0.0
        return UnitRate(
            num_units,
            {
                dtype: (1 - part) * low.peak_flops[dtype] + part * rate
                for dtype, rate in high.peak_flops.items()
                if dtype in low.peak_flops
            },
            (1 - part) * low.memory_bandwidth + part * high.memory_bandwidth,
        )
