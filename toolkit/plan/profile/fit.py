"""From what operators took to a Calibration: a line a class, then a factor for each operator.

The seconds of a backward that does several pieces of work (two products and a bias's sum) are
divided among them as they are predicted, the classes fitted, and divided again. What an operator
then takes beside its class's prediction is its factor: total seconds measured over predicted, so
that long operators weigh by their length.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from toolkit.cost import calibration as fitting
from toolkit.cost import roofline
from toolkit.cost.calibration import Calibration, Measurement, Operator
from toolkit.cost.work import Work
from toolkit.hardware import Device
from toolkit.plan.predict.costs import UPDATE

_ROUNDS = 3


@dataclass(frozen=True)
class Observation:
    """`seconds` that an operator took for all of `works`. Names are those of a Calibration.

    What a runtime adds has no works, but may depend on `num_bytes`.
    """

    name: str
    works: tuple[Work, ...]
    seconds: float
    num_bytes: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Observation:
        works = tuple(Work(**work) for work in row["works"])
        return cls(str(row["name"]), works, float(row["seconds"]), float(row["num_bytes"]))

    @property
    def is_of_class(self) -> bool:
        """Whether a class is fitted to it; the update is many operators, and a class of its own."""
        return self.name != UPDATE and any(work.op_class != "view" for work in self.works)


def calibration(
    observations: Sequence[Observation], device: Device, *, others: Sequence[Observation] = ()
) -> Calibration:
    """Fit `device`'s classes and operators. Raises UsageError when there is too little to fit.

    `others`, of other models, help to tell a class's coefficients apart; an operator's factor is
    this model's alone.
    """
    found: Calibration | None = None
    for _ in range(_ROUNDS):
        measured = [
            one
            for observation in (*observations, *others)
            if observation.is_of_class
            for one in _divided(observation, device, found)
        ]
        found = fitting.fit(measured, device)
    assert found is not None
    return replace(found, operators=_operators(observations, device, found))


def _divided(
    observation: Observation, device: Device, so_far: Calibration | None
) -> Iterator[Measurement]:
    predicted = [roofline.seconds(work, device, calibration=so_far) for work in observation.works]
    for work, seconds in zip(observation.works, predicted, strict=True):
        part = observation.seconds * seconds / sum(predicted)
        if part > 0:
            yield Measurement(work, part)


def _operators(
    observations: Sequence[Observation], device: Device, found: Calibration
) -> dict[str, Operator]:
    groups: defaultdict[str, list[Observation]] = defaultdict(list)
    for observation in observations:
        groups[observation.name].append(observation)
    return {name: _operator(group, device, found) for name, group in sorted(groups.items())}


def _operator(group: Sequence[Observation], device: Device, found: Calibration) -> Operator:
    if not group[0].works:
        return _line(group)
    predicted_s = sum(
        roofline.seconds(work, device, calibration=found) for one in group for work in one.works
    )
    measured_s = sum(one.seconds for one in group)
    if predicted_s > 0:
        return Operator(factor=measured_s / predicted_s)
    return Operator(overhead_s=measured_s / len(group))  # views: no data move, but a call is made


def _line(group: Sequence[Observation]) -> Operator:
    """The line through seconds by bytes between the smallest and the largest, neither below 0."""
    sizes = sorted({one.num_bytes for one in group})
    mean_s = {
        size: statistics.mean(one.seconds for one in group if one.num_bytes == size)
        for size in (sizes[0], sizes[-1])
    }
    if len(sizes) == 1:
        return Operator(overhead_s=mean_s[sizes[0]])
    slope = max(0.0, (mean_s[sizes[-1]] - mean_s[sizes[0]]) / (sizes[-1] - sizes[0]))
    return Operator(overhead_s=max(0.0, mean_s[sizes[0]] - slope * sizes[0]), per_byte_s=slope)
