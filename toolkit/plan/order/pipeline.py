"""From a table to its problem: stages with costs, chained forward and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.errors import UsageError
from toolkit.plan.order.action import Action, Rows
from toolkit.plan.order.problem import Block, Edge, Problem


@dataclass(frozen=True)
class Stage:
    """What one microbatch costs in a stage, on each device of the stage.

    The backward takes `input_grad` + `weight_grad`, together (B) or apart (I, W). A forward holds
    `memory`; I frees it down to `kept`, which W (or B) frees. `kept` None: all of it, the safe
    assumption.
    """

    forward: float = 1.0
    input_grad: float = 1.0
    weight_grad: float = 1.0
    memory: float = 1.0
    kept: float | None = None

    def span(self, kind: str) -> float:
        """Return how long a pass takes."""
        if kind == "B":
            return self.input_grad + self.weight_grad
        return {"F": self.forward, "I": self.input_grad, "W": self.weight_grad}[kind]

    def delta(self, kind: str) -> float:
        """Return what a pass adds to what its devices hold."""
        kept = self.memory if self.kept is None else self.kept
        return {"F": self.memory, "B": -self.memory, "I": kept - self.memory, "W": -kept}[kind]


@dataclass(frozen=True)
class Order:
    """A table and where its stages run: what a generator returns.

    `placement[s]` are the devices of stage s, several where an operator is split over them.
    Stages in `no_grad` have only forwards, and hold nothing.
    """

    name: str
    placement: tuple[tuple[int, ...], ...]
    num_microbatches: int
    rows: Rows
    no_grad: frozenset[int] = frozenset()

    @property
    def num_devices(self) -> int:
        return len(self.rows)

    def problem(
        self,
        stages: Stage | Sequence[Stage] = Stage(),
        *,
        delay: float | Sequence[float] = 0.0,
        memory_limit: float = math.inf,
    ) -> Problem:
        """Return the blocks of this table with their costs: one `Stage` for all, or one each.

        `delay` is what a result takes to another device: one for all, or `delay[s]` between stages
        s and s + 1, both ways.
        """
        given = [stages] * len(self.placement) if isinstance(stages, Stage) else list(stages)
        if len(given) != len(self.placement):
            raise UsageError(
                f"{self.name} has {len(self.placement)} stages; costs for {len(given)}"
            )
        between = len(self.placement) - 1
        delays = [delay] * between if isinstance(delay, (int, float)) else list(delay)
        if len(delays) != between:
            raise UsageError(
                f"{self.name} has {between} boundaries between stages; {len(delays)} delays given"
            )
        present = dict.fromkeys(action for row in self.rows for action in row)
        blocks = []
        for action in present:
            cost = given[action.stage]
            blocks.append(
                Block(
                    action,
                    self.placement[action.stage],
                    cost.span(action.kind),
                    0.0 if action.stage in self.no_grad else cost.delta(action.kind),
                    tuple(self._edges(action, present, delays)),
                )
            )
        return Problem(tuple(blocks), self.num_devices, memory_limit)

    def _edges(
        self, action: Action, present: dict[Action, None], delays: list[float]
    ) -> list[Edge]:
        edges = []
        for source in needs(action, len(self.placement), self.no_grad, present):
            here, there = self.placement[source.stage], self.placement[action.stage]
            # A result of a stage on all devices is everywhere; one of a single device must travel.
            travels = here != there and not set(there) <= set(here)
            edges.append(Edge(source, delays[min(source.stage, action.stage)] if travels else 0.0))
        return edges


def needs(
    action: Action, num_stages: int, no_grad: frozenset[int], present: dict[Action, None]
) -> list[Action]:
    """Return the actions whose results `action` consumes.

    A backward needs its own forward and the input gradient of the next stage, which is what I (or
    B) makes; W needs its own I.
    """
    stage, kind, microbatch = action
    if kind == "F":
        return [Action(stage - 1, "F", microbatch)] if stage else []
    if kind == "W":
        return [Action(stage, "I", microbatch)]
    found = [Action(stage, "F", microbatch)]
    if stage + 1 < num_stages and stage + 1 not in no_grad:
        whole = Action(stage + 1, "B", microbatch)
        found.append(whole if whole in present else Action(stage + 1, "I", microbatch))
    return found


def chain(
    placement: Sequence[Sequence[int]],
    stages: Stage | Sequence[Stage],
    *,
    num_devices: int | None = None,
    split: bool = False,
    delay: float | Sequence[float] = 0.0,
    memory_limit: float = math.inf,
    no_grad: frozenset[int] = frozenset(),
) -> Problem:
    """Return the problem of ONE microbatch through all stages and back: what a search takes.

    >>> [str(block) for block in chain([(0,), (1,)], Stage()).blocks]
    ['0F0', '1F0', '1B0', '0B0']
    """
    places = tuple(tuple(devices) for devices in placement)
    count = num_devices or 1 + max(max(devices) for devices in places)
    forward = [Action(stage, "F", 0) for stage in range(len(places))]
    backward = [
        Action(stage, kind, 0)
        for stage in reversed(range(len(places)))
        if stage not in no_grad
        for kind in (("I", "W") if split else ("B",))
    ]
    rows = tuple(
        tuple(action for action in forward + backward if device in places[action.stage])
        for device in range(count)
    )
    order = Order("chain", places, 1, rows, no_grad)
    problem = order.problem(stages, delay=delay, memory_limit=memory_limit)
    # Rows list blocks device by device; the chain reads better in its own order.
    blocks = {block.action: block for block in problem.blocks}
    return Problem(
        tuple(blocks[action] for action in forward + backward), count, problem.memory_limit
    )
