"""Where to cut the device: Nexus's greedy search, its two modes, and what keeps it from toggling.

Nexus (arXiv 2507.06608 v5, section 4.2, Algorithm 1). One phase is prioritised; it gets as many
units as the other can spare without becoming slower than a slack times its time on the whole
device:

    prefill first:  min T_prefill   so that T_decode  <= beta  * T_decode(all units)
    decode first:   min T_decode    so that T_prefill <= alpha * T_prefill(all units)

Decode comes first while the KV cache is fuller than `kv_switch`: finishing requests frees it. What
the paper's listing leaves open is settled here: cuts are those the device can make, so both phases
keep at least one granule and the two add up to the device; where no cut meets the constraint, the
other phase gets as much as it can; a phase without work is not divided for (the caller asks only
when both have some).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

from toolkit.errors import UsageError
from toolkit.hardware.device import Device


class Mode(enum.Enum):
    """Which phase is prioritised."""

    PREFILL = "prefill first"
    DECODE = "decode first"


@dataclass(frozen=True)
class SearchConfig:
    """The search's numbers. alpha, beta and kv_switch are the paper's (section 6.1).

    `kv_margin` is by how much the cache must empty again before the mode goes back. `delta` is the
    part of the device's units by which a cut must move to be applied at all; the paper names the
    buffer and gives no value.
    """

    alpha: float = 1.3
    beta: float = 1.1
    kv_switch: float = 0.7
    kv_margin: float = 0.05
    delta: float = 0.05

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if getattr(self, name) < 1:
                raise UsageError(
                    f"{name} is {getattr(self, name)}: a phase cannot be faster than on all units",
                    remedy="use 1 or more",
                )
        for name in ("kv_switch", "kv_margin", "delta"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be between 0 and 1")

    def mode(self, kv_usage: float, before: Mode = Mode.PREFILL) -> Mode:
        """Return the mode at a use of the KV cache from 0 to 1, coming from `before`.

        >>> config = SearchConfig()
        >>> [config.mode(0.68, before).value for before in Mode]
        ['prefill first', 'decode first']
        """
        limit = self.kv_switch - (self.kv_margin if before is Mode.DECODE else 0.0)
        return Mode.DECODE if kv_usage > limit else Mode.PREFILL

    def delta_units(self, device: Device) -> int:
        """Return the smallest move of a cut that is applied, in units; at least one granule."""
        multiple = device.unit_granularity[1]
        return multiple * max(1, math.ceil(self.delta * device.num_units / multiple))


def greedy(feasible: Callable[[int], bool], start: int, num: int) -> int:
    """Return the largest feasible position of [0, num) near `start`; 0 where none is.

    `feasible` is asked once a position. Where it is monotone (true up to some position and false
    from there on) the result does not depend on `start` and is the largest feasible position of
    all.

    >>> greedy(lambda at: at <= 6, start=2, num=10), greedy(lambda at: at <= 6, start=9, num=10)
    (6, 6)
    """
    assert 0 <= start < num, (start, num)
    known: dict[int, bool] = {}

    def holds(at: int) -> bool:
        if at not in known:
            known[at] = feasible(at)
        return known[at]

    at = start
    while at > 0 and not holds(at):
        at -= 1
    while at + 1 < num and holds(at + 1):
        at += 1
    return at


def search(
    num_cuts: int,
    prefill_s: Callable[[int], float],
    decode_s: Callable[[int], float],
    *,
    least_prefill_s: float,
    least_decode_s: float,
    mode: Mode,
    config: SearchConfig,
    start: int,
) -> int:
    """Return which of the cuts, in order of prefill's part, the mode asks for.

    `prefill_s` and `decode_s` give the predicted seconds of either phase at a cut; `least_` those
    on the whole device. The search begins at the cut `start`, which costs least where it still
    holds.
    """
    if mode is Mode.PREFILL:
        limit_s = config.beta * least_decode_s
        return greedy(lambda cut: decode_s(cut) <= limit_s, start, num_cuts)
    limit_s = config.alpha * least_prefill_s
    last = num_cuts - 1
    return last - greedy(lambda cut: prefill_s(last - cut) <= limit_s, last - start, num_cuts)
