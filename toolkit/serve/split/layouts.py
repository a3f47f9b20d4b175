"""The ways a device may be laid out for the two phases; all are known, and made, at the start."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from toolkit.errors import InfeasibleError, UsageError
from toolkit.hardware.device import Device
from toolkit.hardware.share import Share, cut_points
from toolkit.serve.request import Phase


@dataclass(frozen=True)
class Layout:
    """Which units compute which phase. Undivided: each step computes both, on all units."""

    prefill: Share
    decode: Share

    def of(self, phase: Phase) -> Share:
        """Return the phase's units."""
        return self.prefill if phase is Phase.PREFILL else self.decode

    @cached_property
    def undivided(self) -> bool:
        return self.prefill == self.decode

    @cached_property
    def whole(self) -> Share | None:
        """All units, for a phase that has nothing beside it; None where each has its own device."""
        if self.prefill.device != self.decode.device:
            return None
        return Share.whole(self.prefill.device)

    def __str__(self) -> str:
        if self.undivided:
            return "undivided"
        return f"{self.prefill.units} | {self.decode.units}"


def undivided(device: Device) -> Layout:
    """Return the layout in which every step has the whole device."""
    whole = Share.whole(device)
    return Layout(whole, whole)


def divided(device: Device) -> tuple[Layout, ...]:
    """Return every division the device's granularity allows, prefill's part ascending.

    Raises InfeasibleError when it allows none.

    >>> from toolkit.hardware import find_device
    >>> [str(layout) for layout in divided(find_device("generic-cpu"))][:2]
    ['1 | 7', '2 | 6']
    """
    found = tuple(
        Layout(Share(device, cut), Share(device, device.num_units - cut, cut))
        for cut in cut_points(device)
    )
    if not found:
        raise InfeasibleError(
            f"{device.name} cannot be divided: it gives out its {device.num_units} units in "
            f"slices of at least {device.unit_granularity[0]}"
        )
    return found


def at(device: Device, prefill_units: int) -> Layout:
    """Return the division that gives prefill so many units. Raises UsageError for none such."""
    for layout in divided(device):
        if layout.prefill.units == prefill_units:
            return layout
    sizes = [layout.prefill.units for layout in divided(device)]
    raise UsageError(
        f"prefill cannot have {prefill_units} of {device.name}'s {device.num_units} units",
        remedy=f"use {sizes[0]} to {sizes[-1]} in steps of {device.unit_granularity[1]}",
    )


def apart(prefill: Device, decode: Device) -> Layout:
    """Return the layout in which each phase has a device of its own (disaggregation).

    The two devices must be told apart by name.
    """
    if prefill.name == decode.name:
        raise UsageError(f"both devices are called {prefill.name}: give them different names")
    return Layout(Share.whole(prefill), Share.whole(decode))
