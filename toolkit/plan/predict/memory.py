"""What the ranks of a plan hold over a step, after every action and at the fullest operator.

A rank holds parameters, AdamW's moments (depending on what is offloaded) and (depending on the way)
gradients all along; each microbatch's saved activations from its forward to its backward; and,
while a piece runs, what passes through it. The peak is taken over time: it is no sum of the parts'
own peaks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

    def __add__(self, other: Usage) -> Usage:
        pairs = zip(self.by_category.values(), other.by_category.values(), strict=True)
        return Usage(*(mine + theirs for mine, theirs in pairs))

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


def on_host(script: Script) -> tuple[int, ...]:
    """Return bytes that each position keeps on its host: parameters, gradients and moments of what
    is offloaded. Empty where nothing is, or the device is the host.
    """
    if script.offload == "none" or not script.apart:
        return ()
    return tuple(
        sum(
            unit.host_bytes + (1 + _MOMENTS) * unit.updated_bytes for unit in script.units(position)
        )
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
        moments = _MOMENTS * sum(unit.updated_bytes for unit in self.units)
        self.base = Usage(
            parameters=sum(unit.held_bytes for unit in self.units),
            optimizer=0 if script.offload != "none" and script.apart else moments,
            communication=script.received_bytes[position] if script.received_bytes else 0,
        )
        if script.offload == "optimizer" and not script.apart:
            # The copies for the update, and of gradients, beside what they are of.
            copied = sum(unit.host_bytes for unit in self.units)
            self.base += Usage(parameters=copied, communication=copied)
        self.alive: dict[tuple[int, int], int] = {}  # (stage, microbatch) -> bytes
        self.begun: set[int] = set()  # stages whose backward has left gradients,
        self.weighed: set[int] = set()  # and those of weights that were put off
        self.sent = 0
        self.completes = {a.stage: a for a in self.row if a.kind in ("B", "W")}
        self.complete: set[int] = set()
        self._extras: dict[tuple[int, str, bool, bool], Usage] = {}

    def run(self, action: Action) -> Usage:
        held = self.script.held[action.stage, self.position]
        life = held.life
        if life is None:
            return self._now()
        key = (action.stage, action.microbatch)
        freed = self.alive.pop(key, 0)
        if action.kind == "W":
            # What was put off is there until its product is.
            self.alive[key] = freed
            found = self._now() + Usage(temporary=life.largest_put_off)
            del self.alive[key]
        else:
            found = self._now() + self._extra(held, action)
        if action.kind == "F":
            if action.stage in self.script.order.no_grad:
                self._sent(action.stage, "F")
            else:
                self.alive[key] = life.kept
            return found
        if action.kind == "I":
            self.alive[key] = life.owed
        if action.kind in ("B", "I"):
            self._sent(action.stage, "F")  # so far among what the microbatch kept
            self._sent(action.stage, "B")
            self.begun.add(action.stage)
        if action.kind in ("B", "W"):
            self.weighed.add(action.stage)
        if self.completes.get(action.stage) == action:
            self.complete.add(action.stage)
        return found

    def _sent(self, stage: int, kind: str) -> None:
        """What is sent is kept until the end of the step, where torch waits for it."""
        transfer = self.script.transfers.get((stage, kind))
        if self.script.keeps_sent and transfer and transfer.sender == self.position:
            self.sent += sum(call.num_bytes for call in transfer.calls)

    def update(self) -> Usage:
        """The end: gradients copied to be reduced, or the largest parameter in the optimizer."""
        copied = self.script.reduced_bytes
        if self.script.update_stream == "host":
            return self._now() + Usage(communication=copied[self.position] if copied else 0)
        largest = max((t.num_bytes for unit in self.units for t in unit.parameters), default=0)
        now = self._now()
        if copied and copied[self.position] > largest:
            return now + Usage(communication=copied[self.position])
        return replace(now, temporary=largest)

    def _now(self) -> Usage:
        return replace(
            self.base,
            gradients=sum(self._gradients(stage) for stage, _ in self._stages()),
            activations=sum(self.alive.values()),
            communication=self.base.communication + self.sent,
        )

    def _stages(self) -> Iterator[tuple[int, Held]]:
        for (stage, place), held in self.script.held.items():
            if place == self.position:
                yield stage, held

    def _gradients(self, stage: int) -> int:
        """Bytes of gradients a stage has between actions."""
        total = 0
        owes = False
        for use in self.script.held[stage, self.position].uses:
            unit = use.unit
            if unit.reserves:
                total += unit.reserved_bytes
            elif stage in self.complete:
                total += unit.shard_bytes
            elif stage in self.begun:
                total += unit.gradient_bytes
                owes = stage not in self.weighed
        life = self.script.held[stage, self.position].life
        return total - (life.put_off if life and owes else 0)

    def _extra(self, held: Held, action: Action) -> Usage:
        """What an action holds at its fullest moment beyond what is held before it."""
        last = self.completes.get(action.stage) == action
        slot = (action.stage, action.kind, action.stage in self.begun, last)
        if slot not in self._extras:
            moments = self._moments(held, action, last)
            self._extras[slot] = max((Usage(), *moments), key=lambda one: one.total)
        return self._extras[slot]

    def _moments(self, held: Held, action: Action, last: bool) -> Iterator[Usage]:
        assert held.life is not None
        forward = action.kind == "F"
        num = len(held.pieces)
        life = held.life
        moments = {"F": life.forward, "B": life.backward, "I": life.inputs}[action.kind]
        for at, moment in enumerate(moments):
            index = at if forward else num - 1 - at
            yield Usage(
                gradients=0 if forward else self._arriving(held, action, index, moment, last),
                activations=moment.saved,
                temporary=moment.passing,
                communication=sum(self._whole(use, index, forward) for use in held.uses),
            )

    def _whole(self, use: Use, index: int, forward: bool) -> int:
        """Bytes of a unit gathered while piece `index` runs.

        The root stays gathered. FSDP2 gathers into one buffer and copies parameters out of it:
        in forward it is kept beside them, in backward the buffer of the next unit is.
        """
        unit = use.unit
        if not unit.gather:
            return 0
        if use.is_root:
            return unit.whole_bytes
        if use.first <= index <= use.last:
            return unit.whole_bytes * (2 if forward else 1)
        return 0 if forward or use.last + 1 != index else unit.whole_bytes

    def _arriving(self, held: Held, action: Action, index: int, moment: Moment, last: bool) -> int:
        """Bytes of gradients beyond those the stage had, when piece `index` is at its fullest."""
        total = 0
        scattered = 0
        for use in held.uses:
            unit = use.unit
            done = use.first > index
            if unit.buffer_bytes and use.first - 1 <= index <= use.last:
                # ZeRO-2's are there until the next unit's are complete, then beside their part.
                total += unit.buffer_bytes + (unit.shard_bytes if done else 0)
            elif unit.gather and last and done:
                # Reduced: the whole gradients are gone, the part is there. What was sent is
                # freed when the next unit is reduced.
                scattered += unit.gradient_bytes
                total += unit.shard_bytes + (unit.gradient_bytes if use.first == index + 1 else 0)
                if action.stage in self.begun:
                    total -= unit.gradient_bytes
        if action.stage in self.begun or any(use.unit.reserves for use in held.uses):
            return total  # what arrives is added to what is there
        return total + max(0, moment.gradients - scattered)
