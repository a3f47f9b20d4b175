"""Recording when each action of a rank ran, on the machine's monotonic clock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from toolkit.plan.order.action import Action
from toolkit.timeline import Span

GROUPS = {"F": "forward", "B": "backward", "I": "backward", "W": "weight gradient"}


class Recorder:
    """Spans of one rank, in seconds since `reset`. On a GPU it times launches, not kernels."""

    def __init__(self, rank: int) -> None:
        self.track = f"rank {rank}"
        self.spans: list[Span] = []
        self._origin_s = time.perf_counter()

    def reset(self) -> None:
        """Forget everything and start the clock again; ranks do so together, after a barrier."""
        self.spans.clear()
        self._origin_s = time.perf_counter()

    def action(self, action: Action) -> contextlib.AbstractContextManager[None]:
        """Record the block as `action`."""
        return self.span(str(action), GROUPS[action.kind])

    @contextlib.contextmanager
    def span(self, name: str, group: str) -> Iterator[None]:
        """Record the block under `name`."""
        start_s = time.perf_counter()
        yield
        end_s = time.perf_counter()
        origin_s = self._origin_s
        self.spans.append(
            Span(name, self.track, start_s - origin_s, end_s - origin_s, "measured", group)
        )
