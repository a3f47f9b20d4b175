"""What the ranks of a plan hold over a step, after every action and at the fullest operator.

A rank holds parameters, AdamW's moments and (depending on the way) gradients all along; each
microbatch's saved activations from its forward to its backward; and, while a piece runs, what
passes through it. The peak is taken over time: it is no sum of the parts' own peaks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from toolkit.cost.memory import CATEGORIES
from toolkit.plan.order.action import Action
from toolkit.plan.predict.alive import Moment
from toolkit.plan.predict.script import Held, Script, Use
from toolkit.plan.predict.simulate import Run
from toolkit.timeline import Counter

# PyTorch's AdamW keeps two moments in the parameter's own type.
_MOMENTS = 2


@dataclass(frozen=True)
class Usage:
    """Bytes by category (cost.memory.CATEGORIES) at one moment."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    temporary: int = 0
    communication: int = 0

    @property
    def total(self) -> int:
        return sum(self.by_category.values())

    @property
    def by_category(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in CATEGORIES}


def peaks(script: Script) -> tuple[Mapping[str, int], ...]:
    """Return bytes by category at the fullest moment of each position."""
    return tuple(
        max(
            (usage for _, usage in over_time(script, position)), key=lambda one: one.total
        ).by_category
        for position in range(len(script.order.rows))
    )


def counters(script: Script, run: Run) -> Iterator[Counter]:
    """Yield what each position holds as the actions of a simulated step end."""
    ends = run.ends
    for position, rank in enumerate(script.ranks):
        samples: dict[float, float] = {}
        for action, usage in over_time(script, position):
            time_s = ends["update", position] if action is None else ends[action, position]
            samples[time_s] = max(samples.get(time_s, 0.0), float(usage.total))
        yield Counter(f"rank {rank} memory", tuple(sorted(samples.items())), "predicted", "B")


def over_time(script: Script, position: int) -> Iterator[tuple[Action | None, Usage]]:
    """Yield each action of a position with the fullest moment in it; the update last (None)."""
    walk = _Walk(script, position)
    for action in script.order.rows[position]:
        yield action, walk.run(action)
    yield None, walk.update()


class _Walk:
    def __init__(self, script: Script, position: int) -> None:
        self.script = script
        self.position = position
        self.row = script.order.rows[position]
        self.units = list(script.units(position))
        self.base = Usage(
            parameters=sum(unit.held_bytes for unit in self.units),
            optimizer=_MOMENTS * sum(unit.updated_bytes for unit in self.units),
            communication=script.received_bytes[position] if script.received_bytes else 0,
        )
        self.alive: dict[tuple[int, int], int] = {}  # (stage, microbatch) -> bytes
        self.begun: set[int] = set()  # stages whose backward has left gradients
        self.completes = {a.stage: a for a in self.row if a.kind in ("B", "W")}
        self.complete: set[int] = set()

    def run(self, action: Action) -> Usage:
        held = self.script.held[action.stage, self.position]
        if held.life is None:
            return self._now()
        key = (action.stage, action.microbatch)
        if action.kind == "F":
            found = self._fullest(held, held.life.forward, action)
            if action.stage not in self.script.order.no_grad:
                self.alive[key] = held.life.kept
            return found
        if action.kind == "W":
            found = self._now()
            extra = held.life.owed
            self.alive.pop(key, None)
            self._left(action)
            return replace(found, temporary=extra)
        del self.alive[key]
        found = self._fullest(held, held.life.backward, action)
        if action.kind == "I":
            # torch keeps the graph for W, and the gradients W starts from.
            self.alive[key] = held.life.kept + held.life.owed
        else:
            self._left(action)
        return found

    def update(self) -> Usage:
        """The optimizer's step: the largest unit's parameters pass through it."""
        largest = max((t.num_bytes for unit in self.units for t in unit.parameters), default=0)
        return replace(self._now(), temporary=largest)

    def _left(self, action: Action) -> None:
        """Gradients that a backward leaves."""
        self.begun.add(action.stage)
        if self.completes.get(action.stage) == action:
            self.complete.add(action.stage)

    def _now(self) -> Usage:
        return replace(
            self.base,
            gradients=sum(self._gradients(stage) for stage, _ in self._stages()),
            activations=sum(self.alive.values()),
        )

    def _stages(self) -> Iterator[tuple[int, Held]]:
        for (stage, place), held in self.script.held.items():
            if place == self.position:
                yield stage, held

    def _gradients(self, stage: int) -> int:
        """Bytes of gradients a stage has between actions."""
        total = 0
        for use in self.script.held[stage, self.position].uses:
            unit = use.unit
            if unit.reserves:
                total += unit.reserved_bytes
            elif stage in self.complete:
                total += unit.shard_bytes
            elif stage in self.begun:
                total += unit.gradient_bytes
        return total

    def _fullest(self, held: Held, moments: Sequence[Moment], action: Action) -> Usage:
        now = self._now()
        forward = action.kind == "F"
        num = len(held.pieces)
        found = [now]
        for at, moment in enumerate(moments):
            index = at if forward else num - 1 - at
            whole = sum(self._whole(use, index, forward) for use in held.uses)
            if forward:
                gradients = now.gradients
            else:
                gradients = now.gradients + self._arriving(held, action, index, moment)
            found.append(
                replace(
                    now,
                    gradients=gradients,
                    activations=now.activations + moment.saved,
                    temporary=moment.passing,
                    communication=now.communication + whole,
                )
            )
        return max(found, key=lambda one: one.total)

    def _whole(self, use: Use, index: int, forward: bool) -> int:
        """Bytes of a unit gathered while piece `index` runs: the root from its first use on, the
        others while they run and, where gathers run ahead, one piece before.
        """
        if not use.unit.gather:
            return 0
        if use.is_root:
            return use.unit.whole_bytes
        ahead = 1 if self.script.prefetch else 0
        low, high = (use.first - ahead, use.last) if forward else (use.first, use.last + ahead)
        return use.unit.whole_bytes if low <= index <= high else 0

    def _arriving(self, held: Held, action: Action, index: int, moment: Moment) -> int:
        """Bytes of gradients beyond those the stage had, when piece `index` is at its fullest."""
        last = self.completes.get(action.stage) == action
        total = 0
        scattered = 0
        for use in held.uses:
            unit = use.unit
            if unit.gather and last and use.first > index:
                # Reduced by now: its whole gradients are gone, its part is there.
                scattered += unit.gradient_bytes
                total += unit.shard_bytes
                if action.stage in self.begun:
                    total -= unit.gradient_bytes
        if action.stage in self.begun or any(use.unit.reserves for use in held.uses):
            return total  # added in place; ZeRO-2's whole gradients are counted by its unit
        return total + max(0, moment.gradients - scattered)
