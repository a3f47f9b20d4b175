"""One stage a device, one direction: GPipe and 1F1B."""

from __future__ import annotations

from toolkit.errors import UsageError
from toolkit.plan.order.action import Action
from toolkit.plan.order.pipeline import Order


def gpipe(num_devices: int, num_microbatches: int) -> Order:
    """All forwards, then all backwards, last microbatch first (Huang et al., arXiv 1811.06965).

    >>> [" ".join(map(str, row)) for row in gpipe(2, 2).rows]
    ['0F0 0F1 0B1 0B0', '1F0 1F1 1B1 1B0']
    """
    check_counts(num_devices, num_microbatches)
    microbatches = range(num_microbatches)
    rows = tuple(
        tuple(Action(stage, "F", i) for i in microbatches)
        + tuple(Action(stage, "B", i) for i in reversed(microbatches))
        for stage in range(num_devices)
    )
    return Order("GPipe", line(num_devices), num_microbatches, rows)


def one_f_one_b(num_devices: int, num_microbatches: int) -> Order:
    """Stage s runs p - s forwards, then one backward and one forward in turn, then drains
    (PipeDream-Flush: Narayanan et al., arXiv 2104.04473, figure 4).

    >>> [" ".join(map(str, row)) for row in one_f_one_b(2, 3).rows]
    ['0F0 0F1 0B0 0F2 0B1 0B2', '1F0 1B0 1F1 1B1 1F2 1B2']
    """
    check_counts(num_devices, num_microbatches)
    rows = []
    for stage in range(num_devices):
        warm_up = min(num_microbatches, num_devices - stage)
        row = [Action(stage, "F", i) for i in range(warm_up)]
        for i in range(num_microbatches):
            row.append(Action(stage, "B", i))
            if warm_up + i < num_microbatches:
                row.append(Action(stage, "F", warm_up + i))
        rows.append(tuple(row))
    return Order("1F1B", line(num_devices), num_microbatches, tuple(rows))


def line(num_devices: int) -> tuple[tuple[int, ...], ...]:
    """Stage s on device s."""
    return tuple((device,) for device in range(num_devices))


def loop(num_devices: int, num_chunks: int) -> tuple[tuple[int, ...], ...]:
    """Stage s on device s mod p: `num_chunks` times around."""
    return line(num_devices) * num_chunks


def vee(num_devices: int) -> tuple[tuple[int, ...], ...]:
    """Down the devices and back up: device d has stages d and 2p - 1 - d."""
    return line(num_devices) + line(num_devices)[::-1]


def check_counts(num_devices: int, num_microbatches: int, num_chunks: int = 1) -> None:
    """Raise UsageError unless all counts are at least 1."""
    counts = {
        "devices": num_devices, "microbatches": num_microbatches, "chunks": num_chunks
    }  # fmt: skip
    for what, count in counts.items():
        if count < 1:
            raise UsageError(f"a pipeline of {count} {what}; at least 1 is needed")
