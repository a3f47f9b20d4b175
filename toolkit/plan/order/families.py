"""The schedules by name."""

from __future__ import annotations

from collections.abc import Callable

from toolkit.errors import unknown_name
from toolkit.plan.order.interleaved import interleaved, looped_bfs
from toolkit.plan.order.pipeline import Order
from toolkit.plan.order.shared import interlaced, three_f_one_b
from toolkit.plan.order.simple import gpipe, one_f_one_b
from toolkit.plan.order.vee import dualpipe_v, zb_v
from toolkit.plan.order.zero_bubble import zb_h1, zb_h2

FAMILIES: dict[str, Callable[[int, int], Order]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "looped-bfs": looped_bfs,
    "zb-h1": zb_h1,
    "zb-h2": zb_h2,
    "zb-v": zb_v,
    "dualpipe-v": dualpipe_v,
    "3f1b": three_f_one_b,
    "interlaced": interlaced,
}


def build(name: str, num_devices: int, num_microbatches: int) -> Order:
    """Return the table of a schedule. Raises UsageError for unknown names and impossible counts.

    >>> build("1f1b", 4, 8).num_devices
    4
    """
    if name not in FAMILIES:
        raise unknown_name("schedule", name, FAMILIES)
    return FAMILIES[name](num_devices, num_microbatches)
