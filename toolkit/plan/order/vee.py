"""Two stages a device, down the devices and back up, so that a microbatch ends where it began:
ZB-V and DualPipeV.

Device d has stages d (chunk 0) and 2p - 1 - d (chunk 1). A row is written as phases, each a few
passes repeated: "F0" is the next forward of chunk 0, "B1" the next whole backward of chunk 1, "I0"
its input gradient, "W0" the oldest weight gradient chunk 0 owes, "W" the oldest owed by either.
"""

from __future__ import annotations

from collections import Counter, deque

from toolkit.errors import UsageError
from toolkit.plan.order.action import Action
from toolkit.plan.order.pipeline import Order
from toolkit.plan.order.simple import check_counts, vee


def zb_v(num_devices: int, num_microbatches: int) -> Order:
    """The memory of 1F1B and no bubble when F, I and W take equal times (Qi et al., arXiv
    2401.10241, section 6). The phases are those of at least 2p - 1 microbatches; with fewer, the
    passes of the missing ones are left out.

    >>> [" ".join(map(str, row)) for row in zb_v(1, 1).rows]
    ['0F0 1F0 1I0 1W0 0I0 0W0']
    """
    check_counts(num_devices, num_microbatches)
    enough = max(num_microbatches, 2 * num_devices - 1)
    rows = []
    for device in range(num_devices):
        left = num_devices - device
        row = _row(
            device,
            num_devices,
            ("F0", 2 * left - 1),
            ("F1 F0", device),
            ("F1 I1 W1", left),
            ("F0 I0 W0 F1 I1 W1", enough - num_devices - left + 1),
            ("I0 W0 F1 I1 W1", left - 1),
            ("I0 I1", device),
            ("I0 W0", left),
            ("W1", device),
            ("W0", device),
        )
        rows.append(tuple(action for action in row if action.microbatch < num_microbatches))
    return Order("ZB-V", vee(num_devices), num_microbatches, tuple(rows))


def dualpipe_v(num_devices: int, num_microbatches: int) -> Order:
    """DualPipe (DeepSeek-V3, arXiv 2412.19437, section 3.2.1) folded into a V: in the steady state
    a forward of one chunk and a backward of the other follow each other, so that one's
    communication hides behind the other's computation; W only where there is a bubble to fill.

    Raises UsageError below 2p microbatches.

    >>> [" ".join(map(str, row)) for row in dualpipe_v(1, 2).rows]
    ['0F0 1F0 0F1 1B0 1F1 0B0 1B1 0I1 0W1']
    """
    check_counts(num_devices, num_microbatches)
    if num_microbatches < 2 * num_devices:
        raise UsageError(
            f"DualPipeV on {num_devices} devices needs at least {2 * num_devices} microbatches, "
            f"as many as stages; {num_microbatches} given"
        )
    rows = []
    for device in range(num_devices):
        left = num_devices - device
        # The last backwards of both chunks in turn: the first half whole, the second split.
        turns = [f"{'B' if at <= device else 'I'}{1 - at % 2}" for at in range(2 * device + 2)]
        row = _row(
            device,
            num_devices,
            ("F0", 2 * left - 2),
            ("F0 F1", device + 1),
            ("I1 W F1", left - 1),
            ("F0 B1 F1 B0", num_microbatches - num_devices - left + 1),
            ("B1 F1 B0", left - 1),
            (" ".join(turns), 1),
            ("W I0", left - 1),
            ("W", device + 1),
        )
        rows.append(tuple(row))
    return Order("DualPipeV", vee(num_devices), num_microbatches, tuple(rows))


def _row(device: int, num_devices: int, *phases: tuple[str, int]) -> list[Action]:
    """Write out the phases, (passes, times), counting microbatches per chunk and kind."""
    stages = {"0": device, "1": 2 * num_devices - 1 - device}
    following: Counter[tuple[str, str]] = Counter()
    owed: dict[str, deque[Action]] = {"0": deque(), "1": deque(), "": deque()}
    row = []
    for passes, times in phases:
        for step in passes.split() * times:
            kind, chunk = step[0], step[1:]
            if kind == "W":
                row.append(owed[chunk].popleft())
                continue
            # B and I advance the same count: both are the backward of the next microbatch.
            count = (chunk, "F" if kind == "F" else "B")
            action = Action(stages[chunk], kind, following[count])
            following[count] += 1
            row.append(action)
            if kind == "I":
                weights = action._replace(kind="W")
                owed[chunk].append(weights)
                owed[""].append(weights)
    return row
