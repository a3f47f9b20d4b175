"""How a served model's device is divided, as people ask for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from toolkit.errors import UsageError, unknown_name

Split = Literal["off", "fixed", "auto"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class SplitSettings:
    """`split`: "off" is the undivided engine; "fixed" gives prefill `prefill_part` of the cores;
    "auto" lets the controller choose, step by step, undivided among its choices.

    `tbt_target_s` is the time between tokens that "auto" is to keep, if one is promised.
    `calibration` is a file of `toolkit serve calibrate`; without one, coefficients are the
    roofline's defaults, corrected as steps are measured.
    """

    split: str = "off"
    prefill_part: float = 0.5
    tbt_target_s: float | None = None
    calibration: Path | None = None

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise unknown_name("split", self.split, SPLITS)
        if not 0 < self.prefill_part < 1:
            raise UsageError(
                f"a part of {self.prefill_part} of the cores for prefill leaves one phase none",
                remedy="use more than 0 and less than 1",
            )
