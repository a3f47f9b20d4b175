"""Shortest prompt first with ageing (Nexus, arXiv 2507.06608 v5, its prefill scheduler)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from toolkit.errors import UsageError
from toolkit.serve.policy.base import Key, Policy, Program
from toolkit.serve.request import Request


class ShortestPromptFirst(Policy):
    """Serve the call with the fewest tokens left to prefill, each second of age forgiving gamma.

    Tokens that the prefix cache holds cost nothing and are not counted.

    Nexus sorts by `remaining - gamma * (now - arrival)`. All calls share `now`, so
    `remaining + gamma * arrival` gives the same order and changes only when a chunk is computed.
    A call of L tokens outranks every new one of l tokens after (L - l) / gamma seconds, so with
    the paper's gamma of 15 tokens/s a long prompt can wait for minutes: raise it to wait less, or
    set `max_wait_s`, after which a call goes before all that have not waited as long.
    """

    name: ClassVar[str] = "spf"
    ranks_cached: ClassVar[bool] = True

    def __init__(self, gamma: float = 15.0, *, max_wait_s: float | None = None) -> None:
        """`gamma`: tokens forgiven per second of waiting; 0 is shortest job first."""
        if gamma < 0:
            raise UsageError(f"gamma is {gamma}; it must be 0 or more")
        if max_wait_s is not None and max_wait_s <= 0:
            raise UsageError(f"a wait of {max_wait_s} s is over at once", remedy="use more than 0")
        self.gamma = gamma
        self.max_wait_s = max_wait_s
        # Arrivals of calls that nothing was computed of, in order; kept where there is a limit.
        self._waiting: dict[str, float] = {}

    def fresh(self) -> ShortestPromptFirst:
        """Return the same policy, knowing of no call."""
        return ShortestPromptFirst(self.gamma, max_wait_s=self.max_wait_s)

    def on_arrival(self, call: Request, program: Program | None, now: float) -> None:
        if self.max_wait_s is not None:
            self._waiting[call.id] = call.arrival_s

    def on_service(
        self, call: Request, program: Program | None, seconds: float, tokens: int, now: float
    ) -> None:
        self._waiting.pop(call.id, None)

    def on_services(
        self,
        call: Request,
        program: Program | None,
        took_s: Sequence[float],
        ends_s: Sequence[float],
    ) -> None:
        self._waiting.pop(call.id, None)

    def service_left_s(self, call: Request) -> float:
        """Return infinity: once a call computes, only its own prefill moves it."""
        return math.inf

    def on_complete(self, call: Request, program: Program | None, now: float) -> None:
        self._waiting.pop(call.id, None)

    def key(self, call: Request, program: Program | None, now: float) -> Key:
        if self.max_wait_s is not None and now - call.arrival_s >= self.max_wait_s:
            return (0, call.arrival_seq, call.id)
        left = call.num_pending - call.num_reusable
        return (1, left + self.gamma * call.arrival_s, call.arrival_seq, call.id)

    def next_change(self, now: float) -> float | None:
        """Return when the next waiting call will have waited for as long as any may."""
        if self.max_wait_s is None:
            return None
        due = (at_s + self.max_wait_s for at_s in self._waiting.values())
        return next((at_s for at_s in due if at_s > now), None)
