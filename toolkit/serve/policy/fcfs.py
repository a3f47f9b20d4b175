"""First come, first served: the order of arrival, which preemption does not change."""

from __future__ import annotations

from typing import ClassVar

from toolkit.serve.policy.base import Key, Policy, Program
from toolkit.serve.request import Request


class FirstComeFirstServed(Policy):
    """Serve in order of arrival."""

    name: ClassVar[str] = "fcfs"

    def key(self, call: Request, program: Program | None, now: float) -> Key:
        return (call.arrival_seq, call.id)
