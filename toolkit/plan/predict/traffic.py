"""What a plan communicates in one step, exactly: kinds, counts and bytes.

Every call of the script is counted as often as its action is run. The optimizer's step is outside:
what is gathered after the update is part of the step's time and not counted here. Copies to the
host and back are no traffic between ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from toolkit.plan.plan import Traffic
from toolkit.plan.predict.costs import COPY, Call
from toolkit.plan.predict.script import Script


def predict(script: Script) -> tuple[Traffic, ...]:
    """Return what one rank of each position communicates."""
    if script.traffic is not None:
        return script.traffic
    count: Counter[tuple[int, str]] = Counter()
    num_bytes: Counter[tuple[int, str]] = Counter()
    for position in range(len(script.order.rows)):
        for kind, size, times in _calls(script, position):
            count[position, kind] += times
            num_bytes[position, kind] += size * times
    return tuple(Traffic(*key, count[key], num_bytes[key]) for key in sorted(count))


def _calls(script: Script, position: int) -> Iterator[tuple[str, int, int]]:
    """(kind, bytes, how often) of all that a rank at `position` communicates."""
    runs = Counter((action.stage, action.kind) for action in script.order.rows[position])
    for (stage, kind), times in runs.items():
        held = script.held[stage, position]
        for piece in held.pieces:
            for step in piece.steps[kind]:
                yield from _each(step.calls, times)
        for use in held.uses:
            if kind == "F" or (kind in ("B", "I") and not use.is_root):
                yield from _each(use.unit.gather, times)
            if kind in ("B", "W"):
                # A stage's gradients are complete once, with the last of either.
                once = kind == "W" or not runs[stage, "W"]
                yield from _each(use.unit.reduce, times if use.unit.each_microbatch else once)
    for transfer in script.transfers.values():
        for call in transfer.calls:
            times = script.order.num_microbatches
            if call.kind != "send" and position in (transfer.sender, *transfer.receivers):
                yield call.kind, call.num_bytes, times
            elif position == transfer.sender:
                yield "send", call.num_bytes, times
            elif position in transfer.receivers:
                yield "recv", call.num_bytes, times
    for shared in script.sums:
        if position in shared.positions:
            yield shared.call.kind, shared.call.num_bytes, 1


def _each(calls: tuple[Call, ...], times: int) -> Iterator[tuple[str, int, int]]:
    for call in calls:
        if times and call.num_bytes and call.kind != COPY:
            yield call.kind, call.num_bytes, times
