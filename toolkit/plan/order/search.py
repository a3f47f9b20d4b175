"""Find a good order for any placement of blocks, say how good it can be at best.

List schedules first; then the steady state with the least period (`repetend`), unrolled, its
warm-up and cool-down pushed together; then forward-backward improvement; and, where the problem is
small and a gap is left, exact search (`frontier`). Whatever is found first stands until something
shorter is found, so time can run out at any point.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from toolkit.errors import InfeasibleError, UsageError
from toolkit.plan.order import bounds, frontier, greedy, repetend
from toolkit.plan.order.clock import Clock
from toolkit.plan.order.problem import Problem
from toolkit.plan.order.schedule import Schedule

# Beyond this many blocks exact search is cut to so narrow a beam that it rarely helps.
_MOST_EXACT = 400
# The mixed-integer program's pairs grow with the square of a microbatch's blocks.
_MOST_IN_PROGRAM = 60


@dataclass(frozen=True)
class Result:
    """The best order found, how, and what it is measured against."""

    schedule: Schedule
    method: str
    bound: bounds.Bound
    repetend: repetend.Repetend | None
    proved: bool

    @property
    def gap(self) -> float:
        """How much longer than the lower bound, as a share of the bound; 0 when proved optimal."""
        if self.proved or self.bound.value == 0:
            return 0.0
        return self.schedule.makespan / self.bound.value - 1


def search(
    one: Problem,
    num_microbatches: int,
    *,
    time_limit_s: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
    heard: Callable[[str, Schedule], None] = lambda method, schedule: None,
) -> Result:
    """Return the best order found for `num_microbatches` of the problem `one` (one microbatch).

    `heard` is told of every improvement. Raises InfeasibleError when the memory limit lets no
    order through, as far as was found.
    """
    if num_microbatches < 1:
        raise UsageError(f"{num_microbatches} microbatches; at least 1 is needed")
    deadline = clock() + time_limit_s
    problem = one.repeat(num_microbatches)
    bound = bounds.makespan(problem)
    best = _Best(bound.value, heard)
    for rule in greedy.RULES:
        best.attempt(f"list, {rule}", partial(greedy.schedule, problem, rule))
    best.attempt("one microbatch after another", partial(one_by_one, problem))
    steady = None
    if len(one.blocks) <= _MOST_IN_PROGRAM and num_microbatches > 1:
        try:
            steady = repetend.search(one, time_limit_s=0.6 * max(0.0, deadline - clock()))
        except InfeasibleError:
            steady = None
    if steady is not None:
        periodic = steady.repeat(num_microbatches)
        best.attempt("repetend", Clock(problem, periodic.rows).schedule, at_par=True)
        keys = [(start,) for start in periodic.starts]
        best.attempt("repetend, loosened", partial(greedy.by_priority, problem, keys))
    while not best.met and best.schedule is not None and clock() < deadline:
        before = best.schedule
        best.attempt("forward-backward improvement", partial(justified, before))
        if best.schedule is before:
            break
    if not best.met and len(problem.blocks) <= _MOST_EXACT and clock() < deadline:
        longest = math.inf if best.schedule is None else best.schedule.makespan
        found = frontier.search(
            problem, shorter_than=longest, time_limit_s=deadline - clock(), clock=clock
        )
        if found.schedule is not None:
            best.offer("exact search", found.schedule)
        best.met = best.met or found.proved
    if best.schedule is None:
        raise InfeasibleError(
            f"no order of {num_microbatches} microbatches was found within a memory of "
            f"{one.memory_limit:g} per device",
            remedy="allow more memory",
        )
    return Result(best.schedule, best.method, bound, steady, best.met)


class _Best:
    """The shortest schedule so far; `met` when none can be shorter."""

    def __init__(self, bound: float, heard: Callable[[str, Schedule], None]) -> None:
        self.bound, self.heard = bound, heard
        self.schedule: Schedule | None = None
        self.method = ""
        self.met = False

    def attempt(self, method: str, make: Callable[[], Schedule], *, at_par: bool = False) -> None:
        """Offer what `make` returns; a schedule that wedges on memory is none."""
        try:
            self.offer(method, make(), at_par=at_par)
        except InfeasibleError:
            return

    def offer(self, method: str, schedule: Schedule, *, at_par: bool = False) -> None:
        """Keep `schedule` if it is shorter (or, `at_par`, as short: a repeating order is the more
        useful one).
        """
        least = math.inf if self.schedule is None else self.schedule.makespan
        close = 1e-9 * schedule.makespan
        if schedule.makespan < least - close or (at_par and schedule.makespan <= least + close):
            schedule.check()
            self.schedule, self.method = schedule, method
            self.met = schedule.makespan <= self.bound + close
            self.heard(method, schedule)


def one_by_one(problem: Problem) -> Schedule:
    """Return the schedule that starts no microbatch before the one ahead has left a device.

    Raises InfeasibleError when even that breaks the memory limit.
    """
    place = {i: at for at, i in enumerate(problem.topological)}
    blocks = problem.blocks
    rows = tuple(
        tuple(blocks[i].action for i in sorted(row, key=lambda i: (blocks[i].action[2], place[i])))
        for row in problem.on_device
    )
    schedule = Clock(problem, rows).schedule()
    if schedule.peak > problem.memory_limit * (1 + 1e-9):
        raise InfeasibleError(
            f"one microbatch alone holds {schedule.peak:g} on a device; the limit is "
            f"{problem.memory_limit:g}"
        )
    return schedule


def justified(schedule: Schedule) -> Schedule:
    """Push every block as late as it goes, then as early as it goes (Li and Willis 1992): gaps
    that no single block could fill close up. Never needs more memory than the limit.
    """
    problem = schedule.problem
    mirrored = problem.reversed()
    late = greedy.by_priority(mirrored, [(-end,) for end in reversed(schedule.ends)])
    return greedy.by_priority(problem, [(-end,) for end in reversed(late.ends)])
