"""The cost model fitted to measured steps of one model on one device, and the file that keeps it.

A phase's curves are fitted end to end, from whole steps on several shares (Nexus, arXiv 2507.06608
v5, section 4.1: one offline profile a model and device). Least squares on the logarithm of
predicted over measured seconds, robust against single outliers. Kernels are the same code for all
steps here, so one set of coefficients serves both phases and mixed steps. Steps measured beside
another give the bandwidth that both draw on.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from toolkit import record
from toolkit.config import cache_dir
from toolkit.cost.calibration import Errors
from toolkit.cost.roofline import Coefficients, Saturation, default_coefficients
from toolkit.cost.work import OpClass
from toolkit.errors import FormatError, UsageError
from toolkit.hardware.device import Device
from toolkit.serve.request import Phase
from toolkit.serve.split.cost_model import CostModel, StepOverhead
from toolkit.serve.split.work import Kernel, Load, ModelWork, PerCount

KIND, VERSION = "serve-calibration", 1
HELD_OUT = 0.25
_MIN_POINTS = 12
_PRIOR = 1e-2


@dataclass(frozen=True)
class Point:
    """A step's loads, its units, and its measured seconds; `beside` ran all the while, if given."""

    prefill: Load
    decode: Load
    units: int
    seconds: float
    beside: Load | None = None

    @property
    def kind(self) -> Phase | None:
        """Its phase, or None for a step of both."""
        if self.prefill and self.decode:
            return None
        return Phase.PREFILL if self.prefill else Phase.DECODE

    @property
    def name(self) -> str:
        """Its kind in words."""
        kind = "mixed" if self.kind is None else self.kind.value
        return kind if self.beside is None else f"{kind} beside the other"


@dataclass(frozen=True)
class KindErrors:
    """|predicted - measured| / measured, of the points fitted and of those held out."""

    fitted: Errors
    held_out: Errors | None = None


@dataclass(frozen=True)
class ServeCalibration:
    """A cost model's numbers. `bandwidth` is what phases side by side share, in bytes a second."""

    processor: str
    device: Device
    work: ModelWork
    products: Coefficients
    attention: Coefficients
    rows: Coefficients
    overhead: StepOverhead
    bandwidth: float
    errors: Mapping[str, KindErrors] = field(default_factory=dict, hash=False)

    def cost_model(self, *, mixed_factor: float = 1.0) -> CostModel:
        """Return the cost model with these numbers; `mixed_factor` is CostModel's."""
        profile: dict[OpClass, Coefficients] = {
            "matmul": self.products, "attention": self.attention, "norm": self.rows,
        }  # fmt: skip
        return CostModel(
            self.work,
            self.device,
            profiles=dict.fromkeys((Phase.PREFILL, Phase.DECODE, None), profile),
            overhead=self.overhead,
            bandwidth=self.bandwidth,
            mixed_factor=mixed_factor,
        )

    def check(self, work: ModelWork, num_units: int, processor: str) -> None:
        """Raise UsageError unless it was measured for this model, as held, on these cores."""
        for what, here, there in (
            ("processor", processor, self.processor),
            ("threads", num_units, self.device.num_units),
            ("model, as it is held here", _shape(work), _shape(self.work)),
        ):
            if here != there:
                raise UsageError(
                    f"the calibration was measured for another {what}"
                    + ("" if what.startswith("model") else f": {there}, and this is {here}"),
                    remedy="run `toolkit serve calibrate` with the same model and options",
                )

    def save(self, path: Path) -> str:
        """Write it as a record, whole or not at all; return its digest."""
        body = asdict(self)
        # Of the device only what the cost model asks for; the rest is the probe's to keep.
        body["device"] = {
            name: getattr(self.device, name)
            for name in (
                *("name", "kind", "memory_bytes", "memory_bandwidth", "peak_flops", "num_units"),
                *("unit_granularity", "launch_overhead_s", "source"),
            )
        }
        return record.write(path, kind=KIND, version=VERSION, body=body)

    @classmethod
    def load(cls, path: Path) -> ServeCalibration:
        """Read one. Raises UsageError when missing, FormatError when it is not one."""
        body = dict(record.read(path, kind=KIND, version=VERSION)["body"])
        try:
            device = dict(body.pop("device"))
            device["unit_granularity"] = tuple(device["unit_granularity"])
            work = dict(body.pop("work"))
            work["kernels"] = tuple(_kernel(row) for row in work["kernels"])
            errors = {name: _errors(row) for name, row in body.pop("errors").items()}
            products, attention, rows = (
                _coefficients(body.pop(name)) for name in ("products", "attention", "rows")
            )
            return cls(
                device=Device(**device),
                work=ModelWork(**work),
                products=products,
                attention=attention,
                rows=rows,
                overhead=StepOverhead(**body.pop("overhead")),
                errors=errors,
                **body,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{path} is not a whole calibration: {error!r}") from error


def default_path(model: str, quantize: str, threads: int) -> Path:
    """Return where a model's calibration is kept when nothing is said."""
    name = "".join(c if c.isalnum() or c in "-._" else "_" for c in model)
    return cache_dir() / "serve" / f"{name}-{quantize}-{threads}.json"


def fit(
    points: Sequence[Point],
    work: ModelWork,
    device: Device,
    processor: str,
    *,
    held_out: float = HELD_OUT,
    seed: int = 0,
) -> ServeCalibration:
    """Fit the cost model to `points`; `held_out` of each kind only judge it.

    Raises UsageError when there are too few.
    """
    judging: list[Point] = []
    fitting: list[Point] = []
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.name, []).append(point)
    for group in groups.values():
        random.Random(seed).shuffle(group)
        num = round(len(group) * held_out)
        judging += group[:num]
        fitting += group[num:]
    alone = [point for point in fitting if point.beside is None]
    if len(alone) < _MIN_POINTS:
        raise UsageError(f"{len(alone)} steps are too few to fit, {_MIN_POINTS} are needed")
    made = _alone(alone, work, device, processor)
    together = [point for point in fitting if point.beside is not None]
    if together:
        made = _together(together, made)
    errors: dict[str, KindErrors] = {}
    for name in groups:
        fitted = Errors.of(relative_errors([p for p in fitting if p.name == name], made))
        if fitted is not None:
            judged = Errors.of(relative_errors([p for p in judging if p.name == name], made))
            errors[name] = KindErrors(fitted, judged)
    return replace(made, errors=errors)


def relative_errors(points: Sequence[Point], made: ServeCalibration) -> list[float]:
    """Return |predicted - measured| / measured of each point."""
    cost = made.cost_model()
    return [abs(predicted_s(cost, point) / point.seconds - 1) for point in points]


def predicted_s(cost: CostModel, point: Point) -> float:
    """Return what the cost model says of a point."""
    kind, share = point.kind, point.units / cost.device.num_units
    load = point.prefill + point.decode
    own = cost.alone(load, kind, share)
    if point.beside is None:
        return own.seconds
    other = Phase.DECODE if kind is Phase.PREFILL else Phase.PREFILL
    return cost.beside(own, cost.alone(point.beside, other, 1.0 - share))


# -- least squares --------------------------------------------------------------------------------


def _alone(
    points: Sequence[Point], work: ModelWork, device: Device, processor: str
) -> ServeCalibration:
    """Fit everything but the shared bandwidth: ten numbers, the saturations only with shares."""
    import numpy as np

    start = default_coefficients("matmul", device)
    with_shares = len({point.units for point in points}) > 1
    # The smallest share measured: below it nothing is known, so the curves bend there at first.
    least = min(point.units for point in points) / device.num_units if with_shares else 1.0
    guess = [*np.log([start.compute_efficiency, start.memory_efficiency])]
    guess += [*np.log([start.compute_efficiency / 3, start.memory_efficiency / 2])]
    guess += [math.log(start.memory_efficiency), math.log(2e-4), math.log(2e-5)]
    guess += [0.9, 0.5] if with_shares else []

    def unpack(x: Sequence[float]) -> ServeCalibration:
        e, m, ea, ma, mr, step_s, sequence_s = (math.exp(value) for value in x[:7])
        slopes = [min(1.0, max(0.0, float(value))) for value in x[7:]] or [1.0, 1.0]
        compute, memory = (Saturation(least, slope) for slope in slopes)

        def coefficients(efficiency: float, reach: float) -> Coefficients:
            return Coefficients(efficiency, reach, 0.0, compute, memory)

        return ServeCalibration(
            processor,
            device,
            work,
            products=coefficients(e, m),
            attention=coefficients(ea, ma),
            rows=coefficients(e, mr),
            overhead=StepOverhead(step_s, sequence_s),
            bandwidth=device.memory_bandwidth * m,
        )

    low = [math.log(1e-3)] * 5 + [math.log(1e-6), math.log(1e-7)] + [0.0] * (len(guess) - 7)
    high = [math.log(1e2)] * 5 + [math.log(1e-1), math.log(1e-2)] + [1.0] * (len(guess) - 7)
    return unpack(_least_squares(points, unpack, guess, low, high))


def _together(points: Sequence[Point], made: ServeCalibration) -> ServeCalibration:
    """Fit the bandwidth that phases side by side share."""

    def unpack(x: Sequence[float]) -> ServeCalibration:
        return replace(made, bandwidth=math.exp(x[0]))

    guess = [math.log(made.bandwidth)]
    return unpack(
        _least_squares(points, unpack, guess, [guess[0] - math.log(8)], [guess[0] + math.log(8)])
    )


def _least_squares(
    points: Sequence[Point],
    unpack: Callable[[Sequence[float]], ServeCalibration],
    guess: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
) -> list[float]:
    import numpy as np
    from scipy.optimize import least_squares

    logs = np.log([point.seconds for point in points])
    middle = np.clip(guess, np.array(low) + 1e-6, np.array(high) - 1e-6)

    def residuals(x: Any) -> Any:
        cost = unpack([float(value) for value in x]).cost_model()
        said = np.log([predicted_s(cost, point) for point in points])
        return np.concatenate([said - logs, _PRIOR * (x - middle)])

    found = least_squares(
        residuals, middle, bounds=(low, high), loss="soft_l1", f_scale=0.1, max_nfev=200
    )
    return [float(value) for value in found.x]


# -- the file -------------------------------------------------------------------------------------


def _shape(work: ModelWork) -> tuple[Any, ...]:
    return work.kernels, work.weight_bytes, work.kv_bytes_per_token


def _kernel(row: Mapping[str, Any]) -> Kernel:
    counts = {name: PerCount(**row[name]) for name in ("flops", "moved_bytes")}
    return Kernel(**{**row, **counts})


def _coefficients(row: Mapping[str, Any]) -> Coefficients:
    names = ("compute_saturation", "memory_saturation")
    return Coefficients(**{**row, **{name: Saturation(**row[name]) for name in names}})


def _errors(row: Mapping[str, Any]) -> KindErrors:
    held_out = Errors(**row["held_out"]) if row["held_out"] else None
    return KindErrors(Errors(**row["fitted"]), held_out)
