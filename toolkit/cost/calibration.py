"""Fit the roofline's coefficients to measurements, and say how far off it still is.

Per op class, least squares on the logarithm of predicted over measured seconds (so that a 1 us and
a 1 s operator weigh alike), robust against single outliers (soft L1). What the measurements of a
class cannot tell apart (all memory-bound: nothing is known of the arithmetic) stays at its default.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from toolkit import record
from toolkit.cost import roofline
from toolkit.cost.roofline import Coefficients, Saturation
from toolkit.cost.work import OP_CLASSES, OpClass, Work
from toolkit.errors import FormatError, UsageError
from toolkit.hardware.device import Device

KIND, VERSION = "calibration", 1
# Fewer samples than this leave a class at its defaults.
MIN_SAMPLES = 4
# A pull towards the defaults, in units of residuals: too weak to matter where data speak.
_PRIOR = 1e-3


@dataclass(frozen=True)
class Measurement:
    """One operator's measured seconds on `share` of the device."""

    work: Work
    seconds: float
    share: float = 1.0

    def __post_init__(self) -> None:
        if not self.seconds > 0 or not 0 < self.share <= 1:
            raise UsageError(
                f"a measurement needs seconds > 0 and a share in (0, 1], not {self.seconds}, "
                f"{self.share}"
            )


@dataclass(frozen=True)
class Errors:
    """|predicted - measured| / measured over some measurements."""

    num_samples: int
    median: float
    p90: float
    maximum: float

    @classmethod
    def of(cls, relative: Sequence[float]) -> Errors | None:
        """Return the summary, or None of nothing.

        >>> Errors.of([0.1, 0.3, 0.2])
        Errors(num_samples=3, median=0.2, p90=0.3, maximum=0.3)
        """
        if not relative:
            return None
        ordered = sorted(relative)

        def quantile(part: float) -> float:
            return ordered[max(0, math.ceil(part * len(ordered)) - 1)]

        return cls(len(ordered), quantile(0.5), quantile(0.9), ordered[-1])


@dataclass(frozen=True)
class ClassFit:
    """The coefficients of one op class and their errors where fitted and where held out."""

    coefficients: Coefficients
    fitted: Errors
    held_out: Errors | None = None


@dataclass(frozen=True)
class Operator:
    """What sets an operator apart from its class.

    seconds = factor * the class's + overhead_s + per_byte_s * bytes; what is of no class (copies a
    runtime makes) has the last two alone.
    """

    factor: float = 1.0
    overhead_s: float = 0.0
    per_byte_s: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """Coefficients fitted on a device. Classes that were not measured keep their defaults.

    `operators` go by name, such as "aten.gelu" or "aten.gelu backward"; others are as their class.
    """

    device: str
    classes: Mapping[OpClass, ClassFit] = field(hash=False)
    notes: tuple[str, ...] = ()
    operators: Mapping[str, Operator] = field(default_factory=dict, hash=False)

    def coefficients(self, op_class: OpClass, device: Device) -> Coefficients | None:
        """Return the fitted coefficients of a class, or None when it keeps its defaults.

        Raises UsageError when `device` is not the one measured (or a slice of it, "this/2").
        """
        if self.device not in (device.name, device.name.split("/")[0]):
            raise UsageError(
                f"the calibration was measured on {self.device}, not on {device.name}",
                remedy=f"calibrate {device.name}, or plan without a calibration",
            )
        fit_ = self.classes.get(op_class)
        return fit_.coefficients if fit_ else None

    def operator(self, name: str) -> Operator:
        """Return what was found of an operator; of one not measured, that it is as its class."""
        return self.operators.get(name, Operator())

    def save(self, path: Path) -> str:
        """Write the calibration as a record; return its digest."""
        return record.write(path, kind=KIND, version=VERSION, body=asdict(self))

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read a calibration. Raises UsageError when missing, FormatError when it is not one."""
        body = record.read(path, kind=KIND, version=VERSION)["body"]
        try:
            classes = {_op_class(name): _class_fit(row) for name, row in body["classes"].items()}
            operators = {name: Operator(**row) for name, row in body.get("operators", {}).items()}
            return cls(str(body["device"]), classes, tuple(body["notes"]), operators)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{path} is not a whole calibration: {error!r}") from error


def _op_class(name: str) -> OpClass:
    for op_class in OP_CLASSES:
        if op_class == name:
            return op_class
    raise ValueError(f"op class {name!r} is unknown")


def _class_fit(row: Mapping[str, Any]) -> ClassFit:
    values = dict(row["coefficients"])
    for name in ("compute_saturation", "memory_saturation"):
        values[name] = Saturation(**values[name])
    held_out = Errors(**row["held_out"]) if row["held_out"] else None
    return ClassFit(Coefficients(**values), Errors(**row["fitted"]), held_out)


def fit(
    measurements: Sequence[Measurement],
    device: Device,
    *,
    held_out: float = 0.25,
    seed: int = 0,
) -> Calibration:
    """Fit every op class that has enough measurements; report errors on fitted and held-out data.

    `held_out` of each class is kept from the fit and only judges it. The saturation is fitted
    where a class was measured at three shares or more. Raises UsageError when there is nothing
    to fit.
    """
    if not 0 <= held_out < 1:
        raise UsageError(f"held_out is a part in [0, 1), not {held_out}")
    groups: dict[OpClass, list[Measurement]] = {}
    for measurement in measurements:
        if measurement.work.op_class != "view":
            groups.setdefault(measurement.work.op_class, []).append(measurement)
    classes: dict[OpClass, ClassFit] = {}
    notes: list[str] = []
    for op_class in OP_CLASSES:
        group = groups.get(op_class, [])
        if not group:
            continue
        random.Random(seed).shuffle(group)
        num_judging = round(len(group) * held_out)
        judging, fitting = group[:num_judging], group[num_judging:]
        if len(fitting) < MIN_SAMPLES:
            notes.append(
                f"{op_class}: {len(fitting)} measurements to fit, fewer than {MIN_SAMPLES}; "
                "defaults kept"
            )
            continue
        coefficients = _fit_class(fitting, device, roofline.default_coefficients(op_class, device))
        fitted = Errors.of(relative_errors(fitting, device, coefficients))
        assert fitted is not None
        classes[op_class] = ClassFit(
            coefficients, fitted, Errors.of(relative_errors(judging, device, coefficients))
        )
        notes.extend(_silent(op_class, fitting, device, coefficients))
    if not classes:
        raise UsageError(
            f"no op class has {MIN_SAMPLES} measurements to fit",
            remedy="; ".join(notes) or "measure more operators",
        )
    return Calibration(device.name, classes, tuple(notes))


def relative_errors(
    measurements: Sequence[Measurement], device: Device, coefficients: Coefficients
) -> list[float]:
    """Return |predicted - measured| / measured of each measurement."""
    return [
        abs(roofline.evaluate(one.work, device, coefficients, one.share).seconds / one.seconds - 1)
        for one in measurements
    ]


def _silent(
    op_class: OpClass, fitting: Sequence[Measurement], device: Device, coefficients: Coefficients
) -> list[str]:
    """Say which coefficients the data did not speak of."""
    bounds = {
        "compute" if estimate.compute_s >= estimate.memory_s else "memory"
        for estimate in (
            roofline.evaluate(one.work, device, coefficients, one.share) for one in fitting
        )
    }
    return [
        f"{op_class}: nothing measured is {bound}-bound; its default efficiency is kept"
        for bound in ("compute", "memory")
        if bound not in bounds
    ]


def _fit_class(fitting: Sequence[Measurement], device: Device, start: Coefficients) -> Coefficients:
    """Least squares over log-efficiencies, log-overhead and, with shares, both saturations."""
    import numpy as np
    from scipy.optimize import least_squares

    with_shares = len({one.share for one in fitting}) >= 3

    def unpack(x: Any) -> Coefficients:
        compute, memory, overhead_s = (float(value) for value in np.exp(x[:3]))
        made = replace(
            start,
            compute_efficiency=compute,
            memory_efficiency=memory,
            overhead_s=overhead_s,
        )
        if not with_shares:
            return made
        points = [float(value) for value in x[3:]]
        return replace(
            made,
            compute_saturation=Saturation(points[0], points[1]),
            memory_saturation=Saturation(points[2], points[3]),
        )

    def first_guess(compute: float, memory: float, overhead_s: float) -> Any:
        head = np.log([compute, memory, max(overhead_s, 1e-9)])
        if not with_shares:
            return head
        tail = [
            value
            for one in (start.compute_saturation, start.memory_saturation)
            for value in (min(one.point, 0.9), min(max(one.slope, 0.1), 0.9))
        ]
        return np.concatenate([head, tail])

    prior = first_guess(start.compute_efficiency, start.memory_efficiency, start.overhead_s)

    def residuals(x: Any) -> Any:
        coefficients = unpack(x)
        predicted = [
            roofline.evaluate(one.work, device, coefficients, one.share).seconds for one in fitting
        ]
        data = np.log(predicted) - np.log([one.seconds for one in fitting])
        return np.concatenate([data, _PRIOR * (x - prior)])

    low, high = np.full(len(prior), -np.inf), np.full(len(prior), np.inf)
    # An efficiency above 1 is possible (data that stay in cache); 100 is not.
    low[:3], high[:3] = np.log([1e-4, 1e-4, 1e-9]), np.log([100.0, 100.0, 10.0])
    if with_shares:
        low[3:], high[3:] = (0.05, 0.0, 0.05, 0.0), (1.0, 1.0, 1.0, 1.0)
    fastest = min(one.seconds for one in fitting)
    guesses = [
        prior,
        first_guess(start.compute_efficiency, start.memory_efficiency, fastest / 2),
        first_guess(0.1, 1.0, fastest / 2),
        first_guess(1.0, 0.1, fastest / 2),
    ]
    fits = [
        least_squares(
            residuals, np.clip(guess, low + 1e-6, high - 1e-6), bounds=(low, high), loss="soft_l1"
        )
        for guess in guesses
    ]
    return unpack(min(fits, key=lambda found: found.cost).x)
