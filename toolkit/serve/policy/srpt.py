"""Shortest remaining program first: knows what no scheduler can know; a bound for the simulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from toolkit.serve.policy.base import Key, Policy, Program
from toolkit.serve.request import Request

# How much of a resident call's remaining work a newcomer may have at most to take its place: a
# preempted call is computed again, which pays only for much shorter ones.
_MUCH_SHORTER = 0.5


class ShortestRemainingProgram(Policy):
    """Serve the call whose program has least left to do, the call's own part included.

    `remaining` tells, of an arriving call, the work left in its program. Not in `POLICIES`: nobody
    but a simulator can say it.
    """

    name: ClassVar[str] = "srpt"

    def __init__(self, remaining: Callable[[Request], float]) -> None:
        self._remaining = remaining
        self._left: dict[str, float] = {}

    def fresh(self) -> ShortestRemainingProgram:
        """Return the same policy, knowing of no call."""
        return ShortestRemainingProgram(self._remaining)

    def on_arrival(self, call: Request, program: Program | None, now: float) -> None:
        """Ask once: what is left of the program when the call comes."""
        self._left[call.id] = self._remaining(call)

    def on_complete(self, call: Request, program: Program | None, now: float) -> None:
        self._left.pop(call.id, None)

    def key(self, call: Request, program: Program | None, now: float) -> Key:
        return (self._left[call.id], call.arrival_seq, call.id)

    def outranks(self, waiting: Request, resident: Request) -> bool:
        return self._left[waiting.id] < _MUCH_SHORTER * self._left[resident.id]
