"""Skip-join multi-level feedback queue (FastServe, arXiv 2305.05920, section 4.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from toolkit.errors import UsageError
from toolkit.serve.policy.base import Key, Policy, Program
from toolkit.serve.request import Request


@dataclass(slots=True)
class _Standing:
    """A call's queue, how much of its quantum it has used, and since when it waits."""

    level: int
    used_s: float = 0.0
    waiting_s: float | None = None


class SkipJoinMLFQ(Policy):
    """Serve the highest queue first; who uses up its quantum goes one down.

    Queue i has a quantum of `quantum_s * 2**i` seconds of service, where a step serves everyone in
    it for all of its time. A call joins the first queue whose quantum its prefill fits into, and so
    skips those it would only pass through. One that waits `starve_s` is in the first queue again. A
    waiting call takes the place of a resident one of a lower queue, which is recomputed later
    (FastServe swaps it out).
    """

    name: ClassVar[str] = "mlfq"

    def __init__(
        self,
        quantum_s: float = 0.1,
        *,
        num_levels: int = 8,
        prefill_rate: float = 10_000.0,
        starve_s: float = 60.0,
    ) -> None:
        """`prefill_rate`: prompt tokens a second, from which the first queue is chosen."""
        if quantum_s <= 0 or num_levels < 1 or prefill_rate <= 0 or starve_s <= 0:
            raise UsageError(
                f"a feedback queue of {num_levels} levels, {quantum_s} s, {prefill_rate} tokens/s, "
                f"{starve_s} s orders nothing",
                remedy="use values above 0",
            )
        self.quantum_s = quantum_s
        self.num_levels = num_levels
        self.prefill_rate = prefill_rate
        self.starve_s = starve_s
        # In order of waiting_s as far as they wait: who begins to wait is put at the end.
        self._standings: dict[str, _Standing] = {}

    def fresh(self) -> SkipJoinMLFQ:
        """Return the same policy, knowing of no call."""
        return SkipJoinMLFQ(
            self.quantum_s,
            num_levels=self.num_levels,
            prefill_rate=self.prefill_rate,
            starve_s=self.starve_s,
        )

    def key(self, call: Request, program: Program | None, now: float) -> Key:
        return (self._level(call, now), call.arrival_seq, call.id)

    def on_arrival(self, call: Request, program: Program | None, now: float) -> None:
        """The call joins the queue that its prefill fits into."""
        prefill_s, level = len(call.prompt_ids) / self.prefill_rate, 0
        while level + 1 < self.num_levels and self._quantum_s(level) < prefill_s:
            level += 1
        self._standings[call.id] = _Standing(level, waiting_s=now)

    def on_service(
        self, call: Request, program: Program | None, seconds: float, tokens: int, now: float
    ) -> None:
        """Use the quantum up; one that starved begins anew at the top."""
        mine = self._standings[call.id]
        if self._starved(mine, now - seconds):
            mine.level, mine.used_s = 0, 0.0
        mine.waiting_s = None
        mine.used_s += seconds
        if mine.used_s >= self._quantum_s(mine.level) and mine.level + 1 < self.num_levels:
            mine.level, mine.used_s = mine.level + 1, 0.0

    def service_left_s(self, call: Request) -> float:
        mine = self._standings[call.id]
        if mine.level + 1 >= self.num_levels:
            return math.inf
        return 0.0 if mine.waiting_s is not None else self._quantum_s(mine.level) - mine.used_s

    def on_complete(self, call: Request, program: Program | None, now: float) -> None:
        self._standings.pop(call.id, None)

    def on_preempt(self, call: Request, now: float) -> None:
        mine = self._standings.pop(call.id)
        mine.waiting_s = now
        self._standings[call.id] = mine

    def outranks(self, waiting: Request, resident: Request) -> bool:
        return self._standings[waiting.id].level < self._standings[resident.id].level

    def next_change(self, now: float) -> float | None:
        """Return when the next waiting call has waited long enough to go first."""
        for one in self._standings.values():
            if one.waiting_s is not None and one.waiting_s + self.starve_s > now:
                return one.waiting_s + self.starve_s
        return None

    def _quantum_s(self, level: int) -> float:
        return self.quantum_s * 2.0**level

    def _starved(self, one: _Standing, now: float) -> bool:
        return one.waiting_s is not None and now - one.waiting_s >= self.starve_s

    def _level(self, call: Request, now: float) -> int:
        mine = self._standings[call.id]
        return 0 if self._starved(mine, now) else mine.level
