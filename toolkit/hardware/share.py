"""Share: a slice of a device (CPU cores, SMs, CUs), aligned to what the device can give."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.errors import InfeasibleError, UsageError
from toolkit.hardware.device import Device


@dataclass(frozen=True)
class Share:
    """Units [start, start + units) of a device.

    The size is a multiple of the device's granularity and at least its smallest slice, except
    that the last slice may take the unaligned remainder (132 SMs in steps of 8 leave 4).
    """

    device: Device
    units: int
    start: int = 0

    def __post_init__(self) -> None:
        device = self.device
        smallest, multiple = device.unit_granularity
        if self.units < 1 or self.start < 0 or self.stop > device.num_units:
            raise UsageError(
                f"units {self.start} to {self.stop} are not a slice of {device.name}, which has "
                f"{device.num_units}"
            )
        remainder = self.stop == device.num_units
        aligned = self.units % multiple == 0 and self.units >= smallest
        if self.start % multiple or not (aligned or remainder):
            raise UsageError(
                f"{self.units} units from {self.start} do not align on {device.name}",
                remedy=f"use at least {smallest} units in multiples of {multiple}",
            )

    @property
    def stop(self) -> int:
        return self.start + self.units

    @property
    def fraction(self) -> float:
        """The part of the device's units in this share, in (0, 1]."""
        return self.units / self.device.num_units

    @classmethod
    def whole(cls, device: Device) -> Share:
        """Return the share that is the device."""
        return cls(device, device.num_units)

    def overlaps(self, other: Share) -> bool:
        """Return whether both use a unit of the same device."""
        same = self.device == other.device
        return same and self.start < other.stop and other.start < self.stop


def check_disjoint(shares: Sequence[Share]) -> None:
    """Raise UsageError when two of the shares use the same unit."""
    ordered = sorted(shares, key=lambda share: (share.device.name, share.start))
    for before, after in itertools.pairwise(ordered):
        if before.overlaps(after):
            raise UsageError(
                f"shares of {after.device.name} overlap: units {before.start} to {before.stop} "
                f"and {after.start} to {after.stop}"
            )


def split(device: Device, fraction: float) -> tuple[Share, Share]:
    """Cut a device in two at the aligned point nearest to `fraction` for the first share.

    Raises InfeasibleError when the device is too small to be cut.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"a split needs a fraction between 0 and 1, not {fraction}")
    cuts = cut_points(device)
    if not cuts:
        raise InfeasibleError(
            f"{device.name} cannot be divided: {device.num_units} units, granularity "
            f"{device.unit_granularity}"
        )
    cut = min(cuts, key=lambda units: abs(units / device.num_units - fraction))
    return Share(device, cut), Share(device, device.num_units - cut, cut)


def cut_points(device: Device) -> tuple[int, ...]:
    """Return every size the first of two shares may have, ascending; both are large enough."""
    smallest, multiple = device.unit_granularity
    first = -(-smallest // multiple) * multiple
    return tuple(
        cut
        for cut in range(first, device.num_units, multiple)
        if device.num_units - cut >= min(smallest, multiple)
    )
