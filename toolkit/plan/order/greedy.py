"""List scheduling: whenever something can start, start what a priority rule likes best.

A rule is a key per block, smaller first. Time moves from event to event; a block that would break
the memory limit waits. With a finite limit a greedy choice can wedge (every device full of
forwards that wait for one another); that is noticed and the rule gives no schedule.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

from toolkit.errors import InfeasibleError, unknown_name
from toolkit.plan.order.problem import Problem, names
from toolkit.plan.order.schedule import Schedule

Key = tuple[float, ...]
Rule = Callable[[Problem], Sequence[Key]]


def critical_path(problem: Problem) -> list[Key]:
    """The longest way still to go first (Kohler 1975)."""
    return [(-problem.tails[i] - block.span,) for i, block in enumerate(problem.blocks)]


def earliest_microbatch(problem: Problem) -> list[Key]:
    """Finish old microbatches first; within one, the longest way to go."""
    return [(block.action.microbatch, -problem.tails[i]) for i, block in enumerate(problem.blocks)]


def backward_first(problem: Problem) -> list[Key]:
    """Backwards before forwards, weights' gradients last: 1F1B and zero-bubble orders."""
    rank = {"B": 0, "I": 0, "F": 1, "W": 2}
    return [
        (rank.get(block.action.kind, 1), block.action.microbatch, -problem.tails[i])
        for i, block in enumerate(problem.blocks)
    ]


def forward_first(problem: Problem) -> list[Key]:
    """Forwards before backwards: as many microbatches under way as memory lets in."""
    rank = {"F": 0, "B": 1, "I": 1, "W": 2}
    return [
        (rank.get(block.action.kind, 0), block.action.microbatch, -problem.tails[i])
        for i, block in enumerate(problem.blocks)
    ]


def memory_aware(problem: Problem) -> list[Key]:
    """What frees the most first, what takes the most last."""
    return [
        (block.memory, block.action.microbatch, -problem.tails[i])
        for i, block in enumerate(problem.blocks)
    ]


def widest_first(problem: Problem) -> list[Key]:
    """Blocks on many devices first: they are the hardest to fit in between others."""
    return [
        (-len(block.devices), block.action.microbatch, -problem.tails[i])
        for i, block in enumerate(problem.blocks)
    ]


RULES: dict[str, Rule] = {
    "critical path": critical_path,
    "earliest microbatch": earliest_microbatch,
    "backward first": backward_first,
    "forward first": forward_first,
    "memory aware": memory_aware,
    "widest first": widest_first,
}


def schedule(problem: Problem, rule: str = "backward first") -> Schedule:
    """Return the list schedule of one rule. Raises InfeasibleError when it wedges on memory."""
    if rule not in RULES:
        raise unknown_name("priority rule", rule, RULES)
    return by_priority(problem, RULES[rule](problem))


def best(problem: Problem) -> Schedule:
    """Return the shortest schedule among all rules. Raises InfeasibleError when all wedge."""
    found: list[Schedule] = []
    wedged: InfeasibleError | None = None
    for rule in RULES:
        try:
            found.append(schedule(problem, rule))
        except InfeasibleError as error:
            wedged = error
    if not found:
        assert wedged is not None
        raise wedged
    return min(found, key=lambda one: one.makespan)


def by_priority(problem: Problem, keys: Sequence[Key]) -> Schedule:
    """Return the schedule that always starts the startable block with the smallest key.

    Raises InfeasibleError when blocks remain and none may start for lack of memory.
    """
    blocks, limit = problem.blocks, problem.memory_limit
    limit = limit * (1 + 1e-9) if math.isfinite(limit) else limit
    starts = [math.nan] * len(blocks)
    missing = [len(sources) for sources in problem.sources]
    free_at = [0.0] * problem.num_devices
    held = [0.0] * problem.num_devices
    waiting = [(keys[i], i) for i, count in enumerate(missing) if count == 0]  # may start now
    heapq.heapify(waiting)
    # (time, 0 a block ends | 1 the last thing a block waits for arrives, which block)
    events: list[tuple[float, int, int]] = []
    ready_at = [0.0] * len(blocks)
    now, left = 0.0, len(blocks)
    while left:
        passed_over = []
        while waiting:
            key, i = heapq.heappop(waiting)
            block = blocks[i]
            takes = max(block.memory, 0.0)
            if any(free_at[d] > now or held[d] + takes > limit for d in block.devices):
                passed_over.append((key, i))
                continue
            starts[i], end = now, now + block.span
            for device in block.devices:
                free_at[device] = end
                held[device] += takes
            heapq.heappush(events, (end, 0, i))
            left -= 1
        waiting = passed_over
        heapq.heapify(waiting)
        if not left:
            break
        if not events:
            stuck = [blocks[i] for _, i in sorted(waiting)]
            raise InfeasibleError(
                f"{names(stuck)} wait for memory that is never freed under the limit of "
                f"{problem.memory_limit:g}",
                remedy="allow more memory, or take another rule or the search",
            )
        now = events[0][0]
        while events and events[0][0] <= now:
            time, what, i = heapq.heappop(events)
            if what == 1:
                heapq.heappush(waiting, (keys[i], i))
                continue
            for device in blocks[i].devices:
                held[device] += min(blocks[i].memory, 0.0)
            for user, delay in problem.users[i]:
                missing[user] -= 1
                ready_at[user] = max(ready_at[user], time + delay)
                if missing[user] == 0:
                    heapq.heappush(events, (ready_at[user], 1, user))
    return Schedule(problem, tuple(starts))
