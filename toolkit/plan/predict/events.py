"""From a script to the tasks the simulation runs."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from toolkit.plan.order.action import Action
from toolkit.plan.order.pipeline import needs
from toolkit.plan.predict import simulate
from toolkit.plan.predict.costs import Call
from toolkit.plan.predict.passes import Step
from toolkit.plan.predict.script import Held, Script, Use
from toolkit.plan.predict.simulate import Task
from toolkit.plan.predict.units import Unit

_GROUPS = {"F": "forward", "B": "backward", "I": "backward", "W": "backward"}


def tasks(script: Script) -> Iterator[Task]:
    """Yield the tasks of one step. A task with key (action, position) ends each action."""
    present = dict.fromkeys(action for row in script.order.rows for action in row)
    reduced: dict[int, dict[str, Hashable]] = {}
    for position, row in enumerate(script.order.rows):
        made = _Row(script, position, present)
        for action in row:
            yield from made.action(action)
        yield from made.put_off()
        reduced[position] = made.reduced
    for position in range(len(script.order.rows)):
        yield from _finish(script, position, reduced[position])


def _finish(script: Script, position: int, reduced: dict[str, Hashable]) -> Iterator[Task]:
    """Add up what several positions hold, update, and make the updated units whole again."""
    rank = script.ranks[position]
    rows = script.order.rows
    waits = [*reduced.values(), *((action, position) for action in rows[position][-1:])]
    for shared in script.sums:
        if position in shared.positions:
            ends = tuple((rows[place][-1], place) for place in shared.positions)
            call = shared.call
            key: Hashable = ("sum", shared.name, position)
            label = f"sum {shared.name}"
            yield Task(key, rank, call.stream, call.seconds, call.kind, ends, label)
            waits.append(key)
    units = [unit for unit in script.units(position) if unit.updated_bytes]
    down = list(_copies_down(script, position, units, reduced, waits))
    yield from down
    key = ("update", position)
    seconds = script.update_s[position] if script.update_s else 0.0
    needed = (*waits, *(task.key for task in down))
    yield Task(key, rank, script.update_stream, seconds, "optimizer", needed, "update")
    for unit in units:
        before: Hashable = key
        for number, call in enumerate((*unit.up, *unit.after_update)):
            own = ("after update", unit.name, number, position)
            label = f"{call.kind} {unit.name or 'root'}"
            yield Task(own, rank, call.stream, call.seconds, "optimizer", (before,), label)
            before = own


def _copies_down(
    script: Script,
    position: int,
    units: list[Unit],
    reduced: dict[str, Hashable],
    waits: list[Hashable],
) -> Iterator[Task]:
    """Gradients go to a host that updates: a unit's once they are reduced, where it is known when
    that is, and beside what the device computes.
    """
    rank = script.ranks[position]
    ends = list(reduced)
    for unit in sorted(units, key=lambda one: ends.index(one.name) if one.name in ends else -1):
        alone = unit.lands and script.prefetch and unit.name in reduced
        needed = (reduced[unit.name],) if alone else tuple(waits)
        for call in unit.down:
            key = ("down", unit.name, position)
            label = f"gradients of {unit.name or 'root'} to the host"
            yield Task(key, rank, call.stream, call.seconds, "optimizer", needed, label)


class _Row:
    """The tasks of one position, in the order they are issued."""

    def __init__(self, script: Script, position: int, present: dict[Action, None]) -> None:
        self.script = script
        self.position = position
        self.present = present
        self.rank = script.ranks[position]
        self.reduced: dict[str, Hashable] = {}  # unit -> the end of its last reduction
        self._alone: dict[tuple[int, str], tuple[float, float]] = {}
        row = self.row = script.order.rows[position]
        # The action that completes a stage's gradients here.
        self.completes = {a.stage: a for a in row if a.kind in ("B", "W")}
        # Stages that put weights' gradients off are reduced at the end of the step.
        self.halved = {a.stage for a in row if a.kind == "W"}

    def action(self, action: Action) -> Iterator[Task]:
        held = self.script.held[action.stage, self.position]
        reduces = action.kind in ("B", "W") and any(
            use.unit.reduce and self._reduces(use, action) for use in held.uses
        )
        gathers = action.kind != "W" and any(use.unit.gather for use in held.uses)
        waits = tuple(self._waits(action))
        apart = reduces or gathers or len(self.script.order.placement) == 1
        if apart and self.script.is_long and self.completes.get(action.stage) != action:
            yield from self._summed(action, held, waits)
        elif apart:
            yield from self._apart(action, held, waits)
        else:
            yield self._whole(action, held, waits)
        yield from self._send(action)

    def _waits(self, action: Action) -> Iterator[Hashable]:
        """Results needed; a stage on several positions begins on all of them together."""
        order = self.script.order
        for source in needs(action, len(order.placement), order.no_grad, self.present):
            here = self.position in order.placement[source.stage]
            kind = "F" if source.kind == "F" else "B"
            sent = not here and (source.stage, kind) in self.script.transfers
            place = self.position if here else order.placement[source.stage][0]
            yield ("send", source) if sent else (source, place)
        for place in order.placement[action.stage]:
            before = self.script.previous.get((action, place))
            if place != self.position and before:
                yield before, place

    def _whole(self, action: Action, held: Held, waits: tuple[Hashable, ...]) -> Task:
        """One task: nothing runs beside it on this rank."""
        steps = [step for piece in held.pieces for step in piece.steps[action.kind]]
        compute_s = sum(step.seconds for step in steps)
        seconds = sum(step.total_s for step in steps)
        return Task(
            (action, self.position), self.rank, "compute", seconds, _GROUPS[action.kind], waits,
            str(action), seconds - compute_s,
        )  # fmt: skip

    def _summed(self, action: Action, held: Held, waits: tuple[Hashable, ...]) -> Iterator[Task]:
        """One task as long as the action takes alone; its reductions, if any, follow as another."""
        slot = (action.stage, action.kind)
        if slot not in self._alone:
            run = simulate.run(self._apart(action, held, (), reduce=False))
            compute_s = sum(step.seconds for p in held.pieces for step in p.steps[action.kind])
            self._alone[slot] = (run.step_s, run.step_s - compute_s)
        seconds, waiting_s = self._alone[slot]
        end = (action, self.position)
        group = _GROUPS[action.kind]
        yield Task(end, self.rank, "compute", seconds, group, waits, str(action), waiting_s)
        if action.kind in ("B", "W"):
            calls = [c for use in held.uses if use.unit.each_microbatch for c in use.unit.reduce]
            for number, call in enumerate(calls):
                key = (end, "reduce", number)
                yield Task(key, self.rank, call.stream, call.seconds, call.kind, (end,), call.kind)

    def _apart(
        self, action: Action, held: Held, waits: tuple[Hashable, ...], *, reduce: bool = True
    ) -> Iterator[Task]:
        """A task for each step, with the gathers and reductions that run beside them."""
        # ends[i]: what ends the i-th piece of this action; its beginning stands first.
        ends: list[tuple[Hashable, ...]] = [waits]
        forward = action.kind == "F"
        places = range(len(held.pieces))
        for index in places if forward else reversed(places):
            piece = held.pieces[index]
            before = list(ends[-1])
            for use in held.uses:
                if use.unit.gather and _gathered(use, index, action.kind):
                    ahead = ends[-2] if self.script.prefetch and len(ends) > 1 else ends[-1]
                    key = ("gather", use.unit.name, action, self.position)
                    yield from self._chain(key, use.unit.gather, ahead, "gather", use)
                    before.append((key, len(use.unit.gather) - 1))
            name = f"{action} {piece.path or f'outside {index}'}"
            last = index == (len(held.pieces) - 1 if forward else 0)
            end: Hashable = (action, self.position) if last else (action, self.position, index)
            yield from self._steps(name, end, piece.steps[action.kind], action.kind, before)
            following: list[Hashable] = [end]
            for use in held.uses if reduce and action.kind in ("B", "W") else ():
                if use.unit.reduce and use.first == index and self._reduces(use, action):
                    key = ("reduce", use.unit.name, action, self.position)
                    yield from self._chain(key, use.unit.reduce, (end,), "", use)
                    done = (key, len(use.unit.reduce) - 1)
                    self._note(use.unit.name, done)
                    if use.unit.gather and not self.script.prefetch:
                        following.append(done)
            ends.append(tuple(following))

    def put_off(self) -> Iterator[Task]:
        """The reductions that wait for the end of the row."""
        for stage in sorted(self.halved):
            for use in self.script.held[stage, self.position].uses:
                if use.unit.reduce:
                    key = ("reduce", use.unit.name, stage, self.position)
                    ends = tuple((a, self.position) for a in self.row[-1:])
                    yield from self._chain(key, use.unit.reduce, ends, "", use)
                    self._note(use.unit.name, (key, len(use.unit.reduce) - 1))

    def _note(self, unit: str, end: Hashable) -> None:
        self.reduced.pop(unit, None)  # the latest goes last
        self.reduced[unit] = end

    def _reduces(self, use: Use, action: Action) -> bool:
        if action.stage in self.halved:
            return False
        return use.unit.each_microbatch or self.completes.get(action.stage) == action

    def _chain(
        self,
        key: Hashable,
        calls: tuple[Call, ...],
        waits: tuple[Hashable, ...],
        verb: str,
        use: Use,
    ) -> Iterator[Task]:
        for number, call in enumerate(calls):
            label = f"{verb or call.kind} {use.unit.name or 'root'}"
            needed = ((key, number - 1),) if number else waits
            yield Task(
                (key, number), self.rank, call.stream, call.seconds, call.kind, needed, label
            )

    def _steps(
        self,
        name: str,
        end: Hashable,
        steps: tuple[Step, ...],
        kind: str,
        before: list[Hashable],
    ) -> Iterator[Task]:
        """Compute, communicate, compute ...; a task with key `end` ends it."""
        waits = tuple(before)
        number = 0
        for step in steps:
            key = (end, number)
            label = f"{name} #{number}" if number else name
            yield Task(key, self.rank, "compute", step.seconds, _GROUPS[kind], waits, label)
            for call in step.calls:
                waits, number = (key,), number + 1
                key = (end, number)
                label = f"{name} {call.kind}"
                yield Task(key, self.rank, call.stream, call.seconds, call.kind, waits, label)
            waits, number = (key,), number + 1
        yield Task(end, self.rank, "compute", 0.0, _GROUPS[kind], waits, name)

    def _send(self, action: Action) -> Iterator[Task]:
        if action.kind == "W":
            return
        transfer = self.script.transfers.get((action.stage, "F" if action.kind == "F" else "B"))
        if transfer and transfer.sender == self.position:
            seconds = sum(call.seconds for call in transfer.calls)
            yield Task(
                ("send", action), self.rank, "peer", seconds, "send", ((action, self.position),),
                f"send {action}",
            )  # fmt: skip


def _gathered(use: Use, index: int, kind: str) -> bool:
    """Whether a unit's parameters are gathered before this piece: the root once, for forward."""
    if kind == "F":
        return index == use.first
    return index == use.last and not use.is_root
