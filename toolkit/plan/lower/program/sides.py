"""Which rank takes which step of an exchange when: on the side of who sends, or of who receives.

Two stages are not run at the same time, so an exchange between them has two halves. What is done
before anything crosses belongs to the sender's half; a message is sent in the one and received in
the other; everything that waits for a message belongs to the receiver's half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from toolkit.errors import InfeasibleError
from toolkit.plan.lower.program.items import Move
from toolkit.plan.materialize.adapter import COLLECTIVES, Adapter, Step


class Task(NamedTuple):
    """What one rank does of a step: `send` and `recv` are the two ends of a message."""

    what: Literal["local", "collective", "send", "recv"]
    step: Step
    place: int  # among the step's tasks of this kind: a broadcast between stages is many sends


class Message(NamedTuple):
    """A message of one exchange: `step` numbers the adapter's steps."""

    move: tuple[str, int, int, bool]  # tensor, from stage, to stage, whether gradients
    step: int
    source: int
    target: int


Tasks = tuple[tuple[str, int, int, Task], ...]  # half, rank, number of the step, task


class Sides:
    """Who does what of the exchanges between stages; `ranks` are those of each stage."""

    def __init__(self, ranks: Sequence[tuple[int, ...]]) -> None:
        self.ranks = ranks
        self._known: dict[tuple[int, tuple[int, ...]], tuple[Adapter, Tasks]] = {}

    def tasks(self, move: Move, *, gradient: bool) -> Iterator[tuple[int, Task]]:
        """Yield (number of the step, task) of what `move.rank` does in a move, forward or back."""
        exchange = move.exchange
        adapter = exchange.backward if gradient else exchange.forward
        assert adapter is not None
        if move.half == "all":
            yield from self.of(adapter, (), ("first", "second"), move.rank)
            return
        receivers = self.ranks[exchange.source if gradient else exchange.target]
        sends = (move.half == "depart") != gradient
        yield from self.of(adapter, receivers, ("first",) if sends else ("second",), move.rank)

    def of(
        self, adapter: Adapter, receivers: tuple[int, ...], halves: Sequence[str], rank: int
    ) -> Iterator[tuple[int, Task]]:
        """Yield the tasks of one rank in some halves of an adapter."""
        key = id(adapter), receivers
        if key not in self._known:  # the adapter is kept, so that its id stays its own
            self._known[key] = adapter, _divided(adapter, frozenset(receivers))
        for half, owner, number, task in self._known[key][1]:
            if owner == rank and half in halves:
                yield number, task


def _divided(adapter: Adapter, receivers: frozenset[int]) -> Tasks:
    late: set[str] = set()  # buffers that exist in the receivers' half only
    found: list[tuple[str, int, int, Task]] = []
    for number, step in enumerate(adapter.steps):
        waits = any(name in late for name in step.reads)
        half = "second" if waits else "first"
        others = step.ranks[1:]
        sends = step.kind == "send" or (
            step.kind == "broadcast" and not waits and receivers.issuperset(others)
        )
        if sends:
            for place, target in enumerate(others):
                found.append((half, step.ranks[0], number, Task("send", step, place)))
                later = "second" if target in receivers else half
                found.append((later, target, number, Task("recv", step, place)))
                if later == "second":
                    late.add(step.writes[place])
            continue
        what: Literal["collective", "local"]
        what = "collective" if step.kind in COLLECTIVES else "local"
        found += [(half, rank, number, Task(what, step, 0)) for rank in step.ranks]
        if waits:
            late.update(step.writes)
    for half, rank, _, task in found:
        if half == "second" and receivers and rank not in receivers:
            raise InfeasibleError(
                f"{task.step.kind} over ranks {task.step.ranks} waits for a stage that rank {rank} "
                f"is not in",
                remedy="split neighbouring stages alike",
            )
    return tuple(found)


def message(move: Move, number: int, task: Task, *, gradient: bool) -> Message:
    """Return which message a send or recv is of (and a name for any other task)."""
    exchange = move.exchange
    name = exchange.tensor, exchange.source, exchange.target, gradient
    ranks = task.step.ranks
    ends = task.what in ("send", "recv")
    return Message(name, number, ranks[0], ranks[1 + task.place] if ends else ranks[0])
