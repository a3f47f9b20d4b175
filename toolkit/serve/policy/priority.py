"""Static priority: what the caller says counts, then the order of arrival."""

from __future__ import annotations

from typing import ClassVar

from toolkit.serve.policy.base import Key, Policy, Program
from toolkit.serve.request import Request


class StaticPriority(Policy):
    """Serve smaller `priority` first; within one, in order of arrival.

    A waiting call takes the place of a resident one of larger priority, for want of memory or of a
    place in the batch alike. Nothing ages: enough urgent calls starve the others.
    """

    name: ClassVar[str] = "priority"

    def key(self, call: Request, program: Program | None, now: float) -> Key:
        return (call.priority, call.arrival_seq, call.id)

    def outranks(self, waiting: Request, resident: Request) -> bool:
        return waiting.priority < resident.priority
