"""Least attained service first, by program: PLAS and ATLAS, and MLFQ as the same without programs.

Autellix (arXiv 2502.13965, sections 4.2 and 4.3). Queues cut the service a program has attained
into bands [lo, hi). A call enters the queue of its program's service, has that queue's quantum, and
goes one queue down when it is used up; within a queue the order is that of arrival:

    MLFQ   every call enters the first queue
    PLAS   the sum of the service of its program's completed calls
    ATLAS  the longest chain of completed calls its program has shown:  critical =
           max(critical, what it was when the call arrived + the call's service)

A call whose program has waited for too long beside what it was given, (W_p + W_c) / (T_p + T_c) >=
beta, or that has itself waited for `max_wait_s`, goes to the first queue, with W_c and T_c begun
anew. The paper gives no numbers. The defaults: queues double from one second, so that a call of a
long program is demoted about once a doubling of its age; beta 8 lets a program wait for 8/9 of its
time (waiting is 80 to 91 % of it at the paper's highest loads, so it acts on outliers only).
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import ClassVar

from toolkit.errors import UsageError
from toolkit.serve.policy.base import Key, Policy, Program
from toolkit.serve.programs.table import ServiceUnit
from toolkit.serve.request import Request, Status


@dataclass(frozen=True)
class QueueConfig:
    """The queues' bounds and quanta, and when a call leaves its place in them.

    `bounds` are the upper ends of all queues but the last, which has none; `quanta` one a queue.
    Both are in the unit of service. A waiting call takes the place of a resident one of a lower
    queue, unless that has held it for less than `min_stay_s` or lost it `max_preemptions` times.
    """

    bounds: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
    quanta: tuple[float, ...] = (1.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, math.inf)
    beta: float | None = 8.0
    max_wait_s: float | None = 120.0
    preempts: bool = True
    min_stay_s: float = 0.5
    max_preemptions: int = 8
    unit: ServiceUnit = field(default_factory=ServiceUnit)

    def __post_init__(self) -> None:
        if list(self.bounds) != sorted(set(self.bounds)) or min(self.bounds, default=1) <= 0:
            raise UsageError(f"bounds {self.bounds} do not ascend from above 0")
        if len(self.quanta) != len(self.bounds) + 1 or min(self.quanta) <= 0:
            raise UsageError(
                f"{len(self.bounds) + 1} queues have {len(self.quanta)} quanta: {self.quanta}",
                remedy="give one above 0 for each bound, and one for the last queue",
            )
        if self.beta is not None and self.beta <= 0:
            raise UsageError(f"beta is {self.beta}; it must be above 0")
        if self.max_wait_s is not None and self.max_wait_s <= 0:
            raise UsageError(f"a wait of {self.max_wait_s} s is over at once", remedy="use more")
        if self.min_stay_s < 0 or self.max_preemptions < 0:
            raise UsageError("a stay and a number of preemptions cannot be below 0")

    def level(self, service: float) -> int:
        """Return the queue of a service: the first is 0.

        >>> [QueueConfig().level(service) for service in (0.0, 1.0, 3.9, 1e9)]
        [0, 1, 2, 7]
        """
        return bisect_right(self.bounds, service)


@dataclass(slots=True)
class _Standing:
    """A call's queue, its service when it entered it, and what no longer counts for starving."""

    call: Request
    level: int
    base: float
    waited_s: float = 0.0
    served_s: float = 0.0
    due_s: float = math.inf


class LeastAttainedService(Policy):
    """The queues; a subclass says where a call enters."""

    def __init__(self, config: QueueConfig | None = None) -> None:
        self.config = config or QueueConfig()
        self.num_promotions = 0
        self._standings: dict[str, _Standing] = {}
        # When waiting calls will have starved; entries that no longer hold are dropped on sight.
        self._dues: list[tuple[float, int, _Standing]] = []
        self._ticks = itertools.count()

    def fresh(self) -> LeastAttainedService:
        """Return the same policy, knowing of no call."""
        return type(self)(self.config)

    def start(self, call: Request, program: Program | None) -> float:
        """Return the service by which a new call's queue is chosen."""
        raise NotImplementedError

    # -- order -----------------------------------------------------------------------------------

    def key(self, call: Request, program: Program | None, now: float) -> Key:
        return (self._level(self._standings[call.id], now), call.arrival_seq, call.id)

    def outranks(self, waiting: Request, resident: Request) -> bool:
        """Whether the queue is a higher one, by what was known when either was last looked at."""
        config, other = self.config, self._standings[resident.id]
        if not config.preempts or resident.num_preemptions >= config.max_preemptions:
            return False
        stayed_s = self._now - resident.since_s
        if stayed_s < config.min_stay_s:
            return False
        return self._level(self._standings[waiting.id], self._now) < self._level(other, self._now)

    def service_left_s(self, call: Request) -> float:
        """Return how long the call can hold its place before it is demoted, or may be displaced."""
        config, mine = self.config, self._standings[call.id]
        left_s = math.inf
        if config.unit.in_seconds:
            quantum = config.quanta[self._level(mine, self._now)]
            left_s = quantum - (config.unit.of(call, self._now) - mine.base)
        stay_s = config.min_stay_s - (self._now - call.since_s)
        return min(left_s, stay_s) if stay_s > 0 and config.preempts else left_s

    def steps_left(self, call: Request) -> float:
        weight = self.config.unit.per_output_token
        if not weight:
            return math.inf
        mine = self._standings[call.id]
        quantum = self.config.quanta[self._level(mine, self._now)]
        return (quantum - (self.config.unit.of(call, self._now) - mine.base)) // weight

    def _level(self, mine: _Standing, now: float) -> int:
        """The call's queue at a time: down one for every quantum that it has used up."""
        config = self.config
        given = config.unit.of(mine.call, now)
        while given - mine.base >= config.quanta[mine.level] and mine.level < len(config.bounds):
            mine.base += config.quanta[mine.level]
            mine.level += 1
        return mine.level

    # -- what happens ----------------------------------------------------------------------------

    _now = 0.0

    def on_arrival(self, call: Request, program: Program | None, now: float) -> None:
        """The call enters the queue of its program's service."""
        self._now = now
        level = self.config.level(self.start(call, program))
        mine = self._standings[call.id] = _Standing(call, level, 0.0)
        self._expect(mine)

    def on_admit(self, call: Request, program: Program | None, now: float) -> None:
        self._now = now
        self._standings[call.id].due_s = math.inf

    def on_complete(self, call: Request, program: Program | None, now: float) -> None:
        """Forget the call; those of its program that wait now have waited beside more service."""
        self._now = now
        mine = self._standings.pop(call.id, None)
        if mine is not None:
            mine.due_s = math.inf
        for other in program.calls.values() if program is not None else ():
            if other.status is Status.WAITING:
                self._expect(self._standings[other.id])

    def on_preempt(self, call: Request, now: float) -> None:
        self._now = now
        mine = self._standings[call.id]
        self._level(mine, now)
        self._expect(mine)

    # -- starving --------------------------------------------------------------------------------

    def next_change(self, now: float) -> float | None:
        """Return when the next waiting call will have waited for too long."""
        self._now = now
        while self._dues and self._dues[0][2].due_s != self._dues[0][0]:
            heapq.heappop(self._dues)
        return self._dues[0][0] if self._dues else None

    def changed(self, now: float) -> Collection[Request]:
        """Promote the waiting calls that have waited for too long; return them."""
        self._now = now
        found = []
        while self._dues and self._dues[0][0] <= now:
            due_s, _, mine = heapq.heappop(self._dues)
            if mine.due_s != due_s:
                continue
            mine.level, mine.base = 0, self.config.unit.of(mine.call, now)
            mine.waited_s, mine.served_s = mine.call.waiting_s(now), mine.call.service_s(now)
            self.num_promotions += 1
            found.append(mine.call)
            # In the first queue there is nowhere further to go.
            mine.due_s = math.inf
        return found

    def _expect(self, mine: _Standing) -> None:
        """Work out when a call that waits will have starved."""
        call, config = mine.call, self.config
        waited_s, served_s = call.waited_s - mine.waited_s, call.served_s - mine.served_s
        due_s = math.inf
        if config.max_wait_s is not None:
            due_s = call.since_s + config.max_wait_s - waited_s
        if config.beta is not None:
            program = call.program
            if program is not None:
                waited_s, served_s = waited_s + program.waited_s, served_s + program.served_s
            # Who was given nothing yet has no ratio; the hard limit is for it.
            if served_s > 0:
                due_s = min(due_s, call.since_s + config.beta * served_s - waited_s)
        mine.due_s = due_s if mine.level > 0 else math.inf
        if mine.due_s < math.inf:
            heapq.heappush(self._dues, (mine.due_s, next(self._ticks), mine))


class FeedbackQueue(LeastAttainedService):
    """MLFQ over calls: every call begins in the first queue, whatever its program was given."""

    name: ClassVar[str] = "feedback"

    def start(self, call: Request, program: Program | None) -> float:
        return 0.0


class ProgramLeastAttained(LeastAttainedService):
    """PLAS: programs of one thread, by the sum of their completed calls."""

    name: ClassVar[str] = "plas"

    def start(self, call: Request, program: Program | None) -> float:
        return program.service if program is not None else 0.0


class ThreadedLeastAttained(LeastAttainedService):
    """ATLAS: programs of many threads, by their longest chain of completed calls."""

    name: ClassVar[str] = "atlas"

    def start(self, call: Request, program: Program | None) -> float:
        return program.critical if program is not None else 0.0
