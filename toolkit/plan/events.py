"""From a plan and its costs to the tasks the simulation runs."""

from __future__ import annotations

from collections.abc import Iterator

from toolkit.plan import chain, simulate, traffic
from toolkit.plan.costs import Costs, Piece, Step
from toolkit.plan.order.action import Action
from toolkit.plan.plan import Plan
from toolkit.plan.simulate import Task

_ROOT = ""


def tasks(plan: Plan, costs: Costs) -> list[Task]:
    """Return the tasks of one step: one representative rank, or one rank of each stage."""
    begins = [stage.begins_at for stage in plan.stages]
    stages = chain.stage_segments(costs.local, begins)
    pieces = [costs.pieces(rank, segments) for rank, segments in enumerate(stages)]
    if len(plan.stages) > 1:
        return [*_pipeline(plan, costs, pieces)]
    return [*_Spmd(plan, costs, pieces[0]).tasks()]


def _pipeline(plan: Plan, costs: Costs, pieces: list[tuple[Piece, ...]]) -> Iterator[Task]:
    last = len(plan.stages) - 1
    forward_bytes, backward_bytes = [0] * (last + 1), [0] * (last + 1)
    for stage, begins in enumerate(plan.stages[1:], start=1):
        assert begins.begins_at is not None
        for tensor in chain.crossing(costs.local, begins.begins_at):
            forward_bytes[stage - 1] += tensor.num_bytes
            backward_bytes[stage] += tensor.num_bytes if tensor.requires_grad else 0
    yield from simulate.pipeline(
        plan.order,
        [sum(piece.forward_s for piece in stage) for stage in pieces],
        [sum(piece.backward_s for piece in stage) for stage in pieces],
        [costs.send_s(forward_bytes[s], s, min(s + 1, last)) for s in range(last + 1)],
        [costs.send_s(backward_bytes[s], s, max(s - 1, 0)) for s in range(last + 1)],
    )
    shared: list[tuple[str, int, tuple[int, ...]]] = [
        (tensor.fqn or tensor.name, tensor.num_bytes, holders)
        for tensor, holders in traffic.shared_parameters(plan, costs.local)
    ]
    ends = [str(row[-1]) for row in plan.order]
    held = traffic.stage_parameters(plan, costs.local)
    for stage in range(last + 1):
        waits = [ends[stage]]
        for name, num_bytes, holders in shared:
            if stage in holders:
                task = Task(
                    f"sum {name} on {stage}",
                    stage,
                    "network",
                    costs.collective_s("all_reduce", num_bytes, holders),
                    "all_reduce",
                    tuple(ends[holder] for holder in holders),
                )
                waits.append(task.name)
                yield task
        update_s = costs.update_s(sum(tensor.num_bytes for tensor in held[stage]), stage)
        yield Task(f"update {stage}", stage, "compute", update_s, "optimizer", tuple(waits))


class _Spmd:
    """One rank that stands for all: they run the same program at the same time."""

    def __init__(self, plan: Plan, costs: Costs, pieces: tuple[Piece, ...]) -> None:
        self.plan = plan
        self.costs = costs
        self.pieces = pieces
        self.sharded = bool(plan.placed("shard"))
        self.unit_bytes = traffic.unit_bytes(costs.local, plan)
        self.reduced_bytes = (
            traffic.scattered_bytes(costs.local, plan) if self.sharded else self.unit_bytes
        )
        # gloo's gathers are waited for where they are issued; on a GPU they run ahead by a unit.
        self.prefetches = costs.cluster.device(0).kind != "cpu"

    def tasks(self) -> Iterator[Task]:
        reduced: list[str] = []
        for action in self.plan.order[0]:
            if action.kind == "F":
                yield from self._forward(action)
            else:
                yield from self._backward(action, reduced)
        parameters = sum(tensor.num_bytes for tensor in self.costs.local.parameters())
        if self.sharded:
            parameters //= self.plan.size("data")
        yield Task(
            "update", 0, "compute", self.costs.update_s(parameters, 0), "optimizer", tuple(reduced)
        )

    def _forward(self, action: Action) -> Iterator[Task]:
        before: list[str] = []
        for index, piece in enumerate(self.pieces):
            name = f"{action} {self._name(index)}"
            gather = self._gather(action, piece, first=index == 0, before=before)
            if gather:
                yield gather
            needs = (gather.name,) if gather else ()
            yield from self._steps(name, piece.forward, "forward", needs, before)

    def _backward(self, action: Action, reduced: list[str]) -> Iterator[Task]:
        before: list[str] = []
        last = action.microbatch + 1 == self.plan.microbatches
        for index in reversed(range(len(self.pieces))):
            piece = self.pieces[index]
            gather = self._gather(action, piece, first=False, before=before)
            if gather:
                yield gather
            needs = (gather.name,) if gather else ()
            name = f"{action} {self._name(index)}"
            yield from self._steps(name, piece.backward, "backward", needs, before)
            unit = piece.path if piece.path is not None else _ROOT
            done = index == 0 if unit == _ROOT else True
            if last and done and self.reduced_bytes.get(unit):
                kind = "reduce_scatter" if self.sharded else "all_reduce"
                seconds = self.costs.collective_s(kind, self.reduced_bytes[unit])
                task = Task(f"{kind} {unit or 'root'}", 0, "network", seconds, kind, (before[-1],))
                reduced.append(task.name)
                yield task
                if self.sharded and not self.prefetches:
                    before.append(task.name)

    def _gather(
        self, action: Action, piece: Piece, *, first: bool, before: list[str]
    ) -> Task | None:
        """The all-gather a piece's parameters need first, if they are sharded."""
        unit = piece.path if piece.path is not None else _ROOT
        if not self.sharded or not self.unit_bytes.get(unit):
            return None
        if unit == _ROOT and not first:
            return None
        ahead = before[:-1] if self.prefetches else before
        seconds = self.costs.collective_s("all_gather", self.unit_bytes[unit])
        name = f"{action} gather {unit or 'root'}"
        return Task(name, 0, "network", seconds, "all_gather", tuple(ahead[-1:]))

    def _steps(
        self,
        name: str,
        steps: tuple[Step, ...],
        group: str,
        needs: tuple[str, ...],
        before: list[str],
    ) -> Iterator[Task]:
        """Compute, reduce, compute ...; `before` collects what has been issued, in order."""
        for i, step in enumerate(steps):
            label = f"{name} #{i}" if i else name
            waits = (*needs, *before[-1:])
            yield Task(label, 0, "compute", step.seconds, group, waits)
            before.append(label)
            if step.reduce_s:
                reduce = f"{label} all-reduce"
                yield Task(reduce, 0, "network", step.reduce_s, "all_reduce", (label,))
                before.append(reduce)

    def _name(self, index: int) -> str:
        path = self.pieces[index].path
        return path if path is not None else f"outside {index}"
