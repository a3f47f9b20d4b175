"""Time, as something passed in: the wall clock for the live engine, a virtual one elsewhere.

This is the only file of the pillar's bookkeeping that may read the machine's clock.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What the engine asks for the time."""

    def now(self) -> float:
        """Return seconds since an arbitrary, fixed start; never decreasing."""
        ...


class WallClock:
    """The machine's monotonic clock, counted from the clock's creation."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._start_s


class VirtualClock:
    """A clock that moves only when told to.

    >>> clock = VirtualClock()
    >>> clock.advance(1.5)
    >>> clock.now()
    1.5
    """

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s = now_s

    def now(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds`. Raises ValueError when negative: time does not go back."""
        if seconds < 0:
            raise ValueError(f"cannot advance a clock by {seconds} s")
        self._now_s += seconds

    def move_to(self, now_s: float) -> None:
        """Move forward to `now_s`. Raises ValueError when that has passed."""
        if now_s < self._now_s:
            raise ValueError(f"cannot set a clock at {self._now_s} s back to {now_s} s")
        self._now_s = now_s
