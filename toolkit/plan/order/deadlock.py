"""Can a table be run at all? Devices execute their rows in order; what would hang or be wrong.

Three things must hold. Every block is in the rows of its devices, once, and in no others. Blocks
on several devices (collectives) come in the same order in the rows of all their devices. Following
rows and dependencies together never leads back to where one began.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from toolkit.plan.order.action import Action
from toolkit.plan.order.problem import Problem, names

What = Literal[
    "foreign", "missing", "repeated", "misplaced", "collective order", "circle", "overtaking"
]


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a table, and the blocks at fault."""

    what: What
    blocks: tuple[Action, ...]
    devices: tuple[int, ...]

    def __str__(self) -> str:
        blocks, where = names(self.blocks), f"device {', '.join(map(str, self.devices))}"
        if self.what == "foreign":
            return f"{blocks} on {where}: no such block"
        if self.what == "missing":
            return f"{blocks} missing from the row of {where}"
        if self.what == "repeated":
            return f"{blocks} more than once in the row of {where}"
        if self.what == "misplaced":
            return f"{blocks} in the row of {where}, where it does not belong"
        if self.what == "collective order":
            return f"{blocks}: {where} run these shared blocks in different orders"
        if self.what == "overtaking":
            return f"{blocks}: {where} receive these in another order than they are sent"
        return f"{' waits for '.join(map(str, self.blocks))}: a circle that never moves"


def find(problem: Problem, rows: Sequence[Sequence[Action]]) -> list[Fault]:
    """Return what is wrong with `rows`; empty exactly when all devices run to their end."""
    contents = list(_contents(problem, rows))
    if contents:
        return contents
    stuck = _stuck(problem, rows)
    if not stuck:
        return []
    return [*_collectives(problem, rows), _circle(problem, rows, stuck)]


def _contents(problem: Problem, rows: Sequence[Sequence[Action]]) -> Iterator[Fault]:
    if len(rows) > problem.num_devices:
        extra = range(problem.num_devices, len(rows))
        actions = tuple(action for device in extra for action in rows[device])
        if actions:
            yield Fault("misplaced", actions, tuple(extra))
    for device in range(problem.num_devices):
        row = rows[device] if device < len(rows) else ()
        counts = Counter(row)
        wanted = {problem.blocks[i].action for i in problem.on_device[device]}
        wrong: dict[What, tuple[Action, ...]] = {
            "foreign": tuple(action for action in counts if action not in problem.index),
            "misplaced": tuple(
                action for action in counts if action in problem.index and action not in wanted
            ),
            "repeated": tuple(action for action, count in counts.items() if count > 1),
            "missing": tuple(sorted(wanted.difference(counts))),
        }
        for what, actions in wrong.items():
            if actions:
                yield Fault(what, actions, (device,))


def _stuck(problem: Problem, rows: Sequence[Sequence[Action]]) -> set[int]:
    """Places of the blocks that never run (Kahn's algorithm over rows and dependencies)."""
    index = problem.index
    places = [[index[action] for action in row] for row in rows]
    missing = [len(sources) for sources in problem.sources]
    following: list[list[int]] = [[] for _ in missing]
    for row in places:
        for first, second in pairwise(row):
            missing[second] += 1
            following[first].append(second)
    can_run = [i for i, count in enumerate(missing) if count == 0]
    for i in can_run:
        for user in following[i]:
            missing[user] -= 1
            if missing[user] == 0:
                can_run.append(user)
        for user, _ in problem.users[i]:
            missing[user] -= 1
            if missing[user] == 0:
                can_run.append(user)
    return set(range(len(missing))).difference(can_run)


def _collectives(problem: Problem, rows: Sequence[Sequence[Action]]) -> Iterator[Fault]:
    """Pairs of devices that run the blocks they share in different orders: the first two that
    differ. NCCL and gloo match collectives by their order, so this hangs or mixes up data.
    """
    shared = [
        [action for action in row if len(problem.blocks[problem.index[action]].devices) > 1]
        for row in rows
    ]
    for first in range(len(rows)):
        for second in range(first + 1, len(rows)):
            common = set(shared[first]) & set(shared[second])
            ours = [action for action in shared[first] if action in common]
            theirs = [action for action in shared[second] if action in common]
            differ = [pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]]
            if differ:
                yield Fault("collective order", differ[0], (first, second))
                return


def _circle(problem: Problem, rows: Sequence[Sequence[Action]], stuck: set[int]) -> Fault:
    """Follow, from any stuck block, something stuck that it waits for, until one comes again."""
    waits_for: dict[int, int] = {}
    for row in rows:
        places = [problem.index[action] for action in row]
        for first, second in pairwise(places):
            if first in stuck:
                waits_for[second] = first
    for i in stuck:
        for source, _ in problem.sources[i]:
            if source in stuck:
                waits_for[i] = source
    seen: dict[int, int] = {}
    path: list[int] = []
    at = min(stuck)
    while at not in seen:
        seen[at] = len(path)
        path.append(at)
        at = waits_for[at]
    circle = path[seen[at] :]
    devices = sorted({device for i in circle for device in problem.blocks[i].devices})
    actions = tuple(problem.blocks[i].action for i in [*circle, circle[0]])
    return Fault("circle", actions, tuple(devices))


def overtaking(problem: Problem, rows: Sequence[Sequence[Action]]) -> list[Fault]:
    """Return the messages of `rows` (which must be free of faults) that overtake one another.

    No fault by itself: it means that a device uses what another sent in a different order. An
    executor that matches sends and receives by their order must then post receives in the order of
    the sends, ahead of their use.
    """
    place = [{action: at for at, action in enumerate(row)} for row in rows]
    messages: dict[tuple[int, int], list[tuple[int, int, Action]]] = {}
    for block in problem.blocks:
        for edge in block.after:
            source = problem.blocks[problem.index[edge.source]]
            sender = source.devices[0]
            for receiver in sorted(set(block.devices) - set(source.devices)):
                sent, used = place[sender][source.action], place[receiver][block.action]
                messages.setdefault((sender, receiver), []).append((sent, used, source.action))
    found = []
    for pair, entries in sorted(messages.items()):
        entries.sort()
        for first, second in pairwise(entries):
            if first[1] > second[1]:
                found.append(Fault("overtaking", (first[2], second[2]), pair))
    return found
