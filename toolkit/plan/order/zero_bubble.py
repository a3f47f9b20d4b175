"""Backward in two halves: only the input's gradient (I) is on the way back through the stages, so
the weights' gradient (W) can fill the bubble (Qi et al., arXiv 2401.10241).
"""

from __future__ import annotations

from toolkit.plan.order.action import Action
from toolkit.plan.order.pipeline import Order
from toolkit.plan.order.simple import check_counts, line


def zb_h1(num_devices: int, num_microbatches: int) -> Order:
    """Within the memory of 1F1B: stage s warms up like 1F1B and runs each W s microbatches late,
    so every device holds p microbatches (section 2.1, figure 3 top).

    >>> [" ".join(map(str, row)) for row in zb_h1(2, 3).rows]
    ['0F0 0F1 0I0 0W0 0F2 0I1 0W1 0I2 0W2', '1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2']
    """
    ahead = [num_devices - stage for stage in range(num_devices)]
    late = list(range(num_devices))
    return _handcrafted("ZB-H1", ahead, late, num_microbatches)


def zb_h2(num_devices: int, num_microbatches: int) -> Order:
    """Up to 2p - 1 microbatches alive, and no bubble when F, I and W take equal times: stage s
    warms up with 2(p - s) - 1 forwards and runs each W 2s microbatches late (figure 3 bottom).

    >>> [" ".join(map(str, row)) for row in zb_h2(2, 3).rows]
    ['0F0 0F1 0F2 0I0 0W0 0I1 0W1 0I2 0W2', '1F0 1I0 1F1 1I1 1F2 1I2 1W0 1W1 1W2']
    """
    ahead = [2 * (num_devices - stage) - 1 for stage in range(num_devices)]
    late = [2 * stage for stage in range(num_devices)]
    return _handcrafted("ZB-H2", ahead, late, num_microbatches)


def _handcrafted(name: str, ahead: list[int], late: list[int], num_microbatches: int) -> Order:
    """Stage s runs `ahead[s]` forwards, then I, W of `late[s]` microbatches before, F in turn."""
    check_counts(len(ahead), num_microbatches)
    rows = []
    for stage in range(len(ahead)):
        row = [Action(stage, "F", i) for i in range(min(ahead[stage], num_microbatches))]
        for i in range(num_microbatches + late[stage]):
            if i < num_microbatches:
                row.append(Action(stage, "I", i))
            if 0 <= i - late[stage] < num_microbatches:
                row.append(Action(stage, "W", i - late[stage]))
            if i + ahead[stage] < num_microbatches:
                row.append(Action(stage, "F", i + ahead[stage]))
        rows.append(tuple(row))
    return Order(name, line(len(ahead)), num_microbatches, tuple(rows))
