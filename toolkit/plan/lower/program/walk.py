"""Walking a plan's step without running it: what each rank communicates, in order.

The executor takes the same actions, items and tasks in the same order; so messages can be awaited
in the order they are sent, and traffic is predicted exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from toolkit.errors import UsageError
from toolkit.hardware.cluster import Cluster
from toolkit.ir.graph import OpGraph
from toolkit.plan.lower.program.exchange import Exchange, Exchanges
from toolkit.plan.lower.program.items import Move, Script, backward_moves, moves
from toolkit.plan.lower.program.outline import check_runs_again
from toolkit.plan.lower.program.script import Stages
from toolkit.plan.lower.program.sides import Message, Sides, Task, message
from toolkit.plan.lower.program.write import Written, write
from toolkit.plan.materialize.adapter import Adapter
from toolkit.plan.order import deadlock
from toolkit.plan.order.action import Action
from toolkit.plan.plan import Plan
from toolkit.plan.tensors import Mask


class Event(NamedTuple):
    """One task of a rank: of which adapter, for which tensor, in which microbatch (-1: once)."""

    action: Action | None
    tensor: str
    adapter: Adapter
    task: Task
    key: tuple[Message, int]


class Walk:
    """A written plan with its exchanges, scripts and weights."""

    def __init__(self, plan: Plan, graph: OpGraph, cluster: Cluster) -> None:
        check(plan)
        self.plan = plan
        self.written: Written = write(plan, graph)
        check_runs_again(self.written)
        self.exchanges = Exchanges(self.written, cluster)
        self.stages = Stages(self.written, self.exchanges)
        self.sides = Sides(self.written.ranks)
        self._scripts: dict[tuple[int, int], Script] = {}

    @property
    def graph(self) -> OpGraph:
        return self.written.graph

    def script(self, stage: int, rank: int) -> Script:
        """Return what a rank does in a stage."""
        if (stage, rank) not in self._scripts:
            self._scripts[stage, rank] = self.stages.script(stage, rank)
        return self._scripts[stage, rank]

    @cached_property
    def held(self) -> dict[str, dict[int, Mask]]:
        """Parameter -> rank -> the part of it that the rank holds."""
        return holdings(self.written, self.exchanges)

    @cached_property
    def weights(self) -> dict[str, Exchange]:
        """Parameter -> how its gradient is summed up, once a step."""
        return {
            name: self.exchanges.weight(name, list(ranks.items()))
            for name, ranks in self.held.items()
        }

    def actions(self, rank: int) -> tuple[Action, ...]:
        """Return the row of actions of a rank."""
        position = rank // self.plan.stride("pipeline") % self.plan.size("pipeline")
        return self.plan.order[position]

    def action_moves(self, rank: int, action: Action) -> Iterator[tuple[Move, bool]]:
        """Yield the moves of an action on a rank in order; True for those of gradients."""
        script = self.script(action.stage, rank)
        if action.kind == "F":
            return moves(script.items)
        return backward_moves(script.items) if script.learns else iter(())

    def events(self, rank: int) -> Iterator[Event]:
        """Yield what a rank does between ranks in its actions, in order."""
        for action in self.actions(rank):
            for move, gradient in self.action_moves(rank, action):
                adapter = move.exchange.backward if gradient else move.exchange.forward
                assert adapter is not None
                for number, task in self.sides.tasks(move, gradient=gradient):
                    key = message(move, number, task, gradient=gradient)
                    yield Event(
                        action, move.exchange.tensor, adapter, task, (key, action.microbatch)
                    )

    def weight_events(self, name: str, rank: int) -> Iterator[Event]:
        """Yield what a rank does to sum up the gradient of a parameter."""
        exchange = self.weights[name]
        adapter = exchange.backward
        if rank in self.held[name] and adapter is not None and adapter.communication:
            move = Move(0, rank, exchange, "all")
            for number, task in self.sides.tasks(move, gradient=True):
                yield Event(
                    None, name, adapter, task, (message(move, number, task, gradient=True), -1)
                )


def holdings(written: Written, exchanges: Exchanges) -> dict[str, dict[int, Mask]]:
    """Return parameter -> rank -> the part of it that the rank's operators read.

    One that no operator reads is held, whole, where the model begins.
    """
    found: dict[str, dict[int, Mask]] = {}
    for tensor in written.graph.parameters():
        boxes: dict[int, list[Mask]] = {}
        for stage in range(len(written.ops)):
            for rank, mask in exchanges.readings(tensor.name, stage)[0]:
                boxes.setdefault(rank, []).append(mask)
        found[tensor.name] = {rank: _hull(several) for rank, several in sorted(boxes.items())}
        if not boxes:
            found[tensor.name] = dict.fromkeys(written.ranks[0], Mask.whole(tensor.shape))
    return found


def _hull(masks: list[Mask]) -> Mask:
    spans = zip(*(mask.box for mask in masks), strict=True)
    return Mask(tuple((min(low for low, _ in some), max(high for _, high in some))
                      for some in map(list, spans)))  # fmt: skip


def check(plan: Plan) -> None:
    """Raise UsageError for what this executor does not run, or an order that would hang."""
    halves = {action.kind for row in plan.order for action in row} - {"F", "B"}
    if halves:
        raise UsageError(
            f"the order of {plan.schedule} has {' and '.join(sorted(halves))} actions, and the own "
            f"executor runs whole backwards only",
            remedy="take a schedule without split backward (1f1b, interleaved, 3f1b, interlaced)",
        )
    for how in ("shard", "shard_gradients", "shard_optimizer"):
        if plan.placed(how):
            raise UsageError(
                f"the own executor replicates states over data, and {how} is asked for",
                remedy="place the units `replicate`",
            )
    if len(plan.order) != plan.size("pipeline"):
        raise UsageError(
            f"the order has {len(plan.order)} rows for {plan.size('pipeline')} positions"
        )
    faults = deadlock.find(plan.table.problem(), plan.order)
    if faults:
        raise UsageError(f"this order cannot run: {'; '.join(map(str, faults))}")
