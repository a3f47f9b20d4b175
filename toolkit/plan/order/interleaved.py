"""Several stages a device, around the devices in a loop: interleaved 1F1B and looped BFS."""

from __future__ import annotations

from toolkit.errors import UsageError
from toolkit.plan.order.action import Action
from toolkit.plan.order.pipeline import Order
from toolkit.plan.order.simple import check_counts, loop


def interleaved(num_devices: int, num_microbatches: int, num_chunks: int = 2) -> Order:
    """1F1B over chunks of the model, p microbatches of a chunk at a time (Narayanan et al.,
    arXiv 2104.04473, section 2.2). Raises UsageError unless p divides the microbatches.

    >>> [" ".join(map(str, row)) for row in interleaved(2, 2).rows]
    ['0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1', '1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1']
    """
    check_counts(num_devices, num_microbatches, num_chunks)
    if num_microbatches % num_devices:
        raise UsageError(
            f"interleaved 1F1B runs microbatches in groups of the {num_devices} devices; "
            f"{num_microbatches} is not a multiple"
        )
    if num_chunks == 1:
        warm_ups = [num_devices - device - 1 for device in range(num_devices)]
    else:
        warm_ups = [
            2 * (num_devices - device - 1) + (num_chunks - 1) * num_devices
            for device in range(num_devices)
        ]
    total = num_microbatches * num_chunks
    rows = []
    for device, warm_up in enumerate(warm_ups):
        forwards = [
            Action(chunk * num_devices + device, "F", i)
            for chunk, i in _visits(num_devices, num_microbatches, num_chunks)
        ]
        backwards = [
            Action((num_chunks - 1 - chunk) * num_devices + device, "B", i)
            for chunk, i in _visits(num_devices, num_microbatches, num_chunks)
        ]
        ahead = min(warm_up, total)
        row = forwards[:ahead]
        for at in range(total):
            row += forwards[ahead + at : ahead + at + 1]
            row.append(backwards[at])
        rows.append(tuple(row))
    name = f"interleaved 1F1B, {num_chunks} chunks"
    return Order(name, loop(num_devices, num_chunks), num_microbatches, tuple(rows))


def _visits(num_devices: int, num_microbatches: int, num_chunks: int) -> list[tuple[int, int]]:
    """(chunk, microbatch): a group of p microbatches through every chunk, then the next group."""
    return [
        (chunk, group + i)
        for group in range(0, num_microbatches, num_devices)
        for chunk in range(num_chunks)
        for i in range(num_devices)
    ]


def looped_bfs(num_devices: int, num_microbatches: int, num_chunks: int = 2) -> Order:
    """GPipe over chunks: all microbatches through one chunk before the next, so that a chunk's
    weights are gathered once (breadth-first pipeline, Lamy-Poirier, arXiv 2211.05953).

    >>> [" ".join(map(str, row)) for row in looped_bfs(1, 2).rows]
    ['0F0 0F1 1F0 1F1 1B1 1B0 0B1 0B0']
    """
    check_counts(num_devices, num_microbatches, num_chunks)
    microbatches = range(num_microbatches)
    rows = []
    for device in range(num_devices):
        stages = range(device, num_devices * num_chunks, num_devices)
        row = [Action(stage, "F", i) for stage in stages for i in microbatches]
        row += [Action(s, "B", i) for s in reversed(stages) for i in reversed(microbatches)]
        rows.append(tuple(row))
    name = f"looped BFS, {num_chunks} chunks"
    return Order(name, loop(num_devices, num_chunks), num_microbatches, tuple(rows))
