"""The script of a plan that the own executor runs, from what it writes for each rank.

Splits of operators, stages on several positions or without gradients, and pipelines whose stages
are split again: which rank runs which part, and what it communicates around each operator, is
read off `lower/program`, so that predicted and run are the same by construction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from toolkit.ir.graph import OpGraph, Tensor
from toolkit.plan import chain
from toolkit.plan.lower.program import local as executor
from toolkit.plan.lower.program import reduce
from toolkit.plan.lower.program.items import Item, Move
from toolkit.plan.lower.program.items import Segment as Stretch
from toolkit.plan.lower.program.items import Unit as Again
from toolkit.plan.lower.program.local import Local
from toolkit.plan.lower.program.walk import Walk
from toolkit.plan.plan import Plan
from toolkit.plan.predict.alive import Alive, Life
from toolkit.plan.predict.costs import Call, Costs
from toolkit.plan.predict.passes import Piece, Step, Steps
from toolkit.plan.predict.script import Held, Script, Sum, Transfer, Use
from toolkit.plan.predict.units import Unit, updated_on_host


def of(plan: Plan, graph: OpGraph, costs: Costs) -> Script:
    """Return the script of a plan; `graph` is the model at one rank's microbatch, whole."""
    walk = executor.walk_of(plan, graph, costs.cluster)
    reader = _Reader(plan, walk, costs)
    held: dict[tuple[int, int], Held] = {}
    transfers: dict[tuple[int, str], Transfer] = {}
    updates = []
    for position in range(len(plan.order)):
        units = reader.units(position)
        for stage in plan.held_stages(position):
            found = reader.stage(stage, position)
            transfers.update(found.transfers)
            # The parameters of a position are held once, whichever of its stages read them.
            held[stage, position] = replace(found.held, uses=units)
            units = ()
        updated = sum(u.unit.updated_bytes for u in reader.units(position))
        updates.append(costs.update_s(updated, position))
    return Script(
        order=plan.table,
        ranks=costs.ranks,
        held=held,
        transfers=transfers,
        sums=tuple(reader.sums()),
        update_s=tuple(updates),
        reduced_bytes=tuple(
            sum(one.num_bytes for one in reduce.reductions(walk, rank)) for rank in costs.ranks
        ),
        prefetch=not costs.is_cpu,
        offload=plan.offload,
        update_stream=costs.update_stream,
        apart=not costs.is_cpu,
        traffic=executor.traffic_of(walk),
    )


@dataclass(frozen=True)
class _Stage:
    held: Held
    transfers: Mapping[tuple[int, str], Transfer]


class _Reader:
    def __init__(self, plan: Plan, walk: Walk, costs: Costs) -> None:
        self.plan = plan
        self.walk = walk
        self.costs = costs
        self.paths = {
            op.name: segment.path for segment in chain.segments(walk.graph) for op in segment.ops
        }

    def position(self, rank: int) -> int:
        return rank // self.plan.stride("pipeline") % self.plan.size("pipeline")

    def units(self, position: int) -> tuple[Use, ...]:
        """What a position holds of the parameters, as one unit; its gradients are summed last."""
        rank = self.costs.ranks[position]
        tensors = [
            _part(self.walk.graph.tensors[name], masks[rank].shape)
            for name, masks in self.walk.held.items()
            if rank in masks
        ]
        whole = sum(tensor.num_bytes for tensor in tensors)
        trained = sum(tensor.num_bytes for tensor in tensors if tensor.requires_grad)
        unit = Unit("", tuple(tensors), whole, trained, trained, trained)
        if self.plan.offload == "optimizer":
            unit = updated_on_host(unit, self.costs, position)
        return (Use(unit, 0, 0),)

    def sums(self) -> Iterator[Sum]:
        """The reductions at the end of a step, each once."""
        seen: set[tuple[str, tuple[int, ...]]] = set()
        for rank in self.costs.ranks:
            for one in reduce.reductions(self.walk, rank):
                if (one.unit, one.ranks) not in seen:
                    seen.add((one.unit, one.ranks))
                    positions = tuple(sorted({self.position(other) for other in one.ranks}))
                    call = self.costs.call("all_reduce", one.num_bytes, one.ranks)
                    yield Sum(f"{one.unit or 'root'} {len(seen)}", positions, call)

    def stage(self, stage: int, position: int) -> _Stage:
        """Return what a position does in a stage."""
        local = executor.local(self.walk, stage, self.costs.ranks[position])
        seconds = _Seconds(local, self.costs, position)
        transfers: dict[tuple[int, str], Transfer] = {}
        steps: list[dict[str, list[Step]]] = []
        paths: list[str | None] = []
        for kind, run in (("F", local.forward), ("B", local.backward)):
            leaving: list[Call] = []
            receivers: set[int] = set()
            current = -1 if kind == "F" else len(paths)
            ran = False
            for step, again in zip(run.steps, run.again, strict=True):
                if isinstance(step, executor.Call):
                    outside = {self.position(rank) for rank in step.ranks}
                    outside -= set(self.plan.stages[stage].devices)
                    if outside and not ran:
                        continue  # arrives: whoever sends it takes the time
                    call = self._call(step)
                    if outside:
                        leaving.append(call)
                        receivers |= outside
                    else:
                        current = max(current, 0)
                        if not paths:
                            paths.append(None)
                            steps.append({})
                        steps[min(current, len(steps) - 1)].setdefault(kind, []).append(
                            Step(0.0, (call,))
                        )
                    continue
                ran = True
                path = self.paths[step[0]]
                if kind == "F" and (current < 0 or paths[current] != path):
                    paths.append(path)
                    steps.append({})
                    current = len(paths) - 1
                elif kind == "B":
                    while current == len(paths) or (current and paths[current] != path):
                        current -= 1
                computed = seconds.of(step[0], "F" if again else kind)
                steps[current].setdefault(kind, []).append(Step(computed))
            if leaving:
                transfers[stage, kind] = Transfer(
                    position, tuple(sorted(receivers)), tuple(leaving)
                )
        pieces = tuple(
            Piece(path, {kind: _joined(some.get(kind, ())) for kind in "FB"})
            for path, some in zip(paths, steps, strict=True)
        )
        return _Stage(Held(pieces, life=self._life(local)), transfers)

    def _call(self, call: executor.Call) -> Call:
        if call.kind in ("send", "recv"):
            found = self.costs.call("send", call.num_bytes, call.ranks)
            return replace(found, kind=call.kind, stream="peer")
        return self.costs.call(call.kind, call.num_bytes, call.ranks)

    def _life(self, local: Local) -> Life:
        script = self.walk.script(local.stage, local.rank)
        segments: list[chain.Segment] = []
        again: list[str] = []
        seen: set[str] = set()
        for item in script.items:
            ops = [name for name in dict.fromkeys(_ops(item)) if name not in seen]
            seen.update(ops)
            if ops:
                path = str(len(segments))
                segments.append(chain.Segment(path, tuple(local.graph.op(name) for name in ops)))
                if isinstance(item, Again):
                    again.append(path)
        life = Alive(local.graph, self.costs.kernels).life(segments, again, local.graph.outputs)
        arrived = sum(
            local.graph.tensors[name].num_bytes
            for name in local.graph.inputs
            if self.walk.graph.tensors[name].role == "activation"
        )
        return replace(life, kept=life.kept + arrived)


class _Seconds:
    """What the operators of a rank's part take."""

    def __init__(self, local: Local, costs: Costs, position: int) -> None:
        self.local = local
        self.costs = costs
        self.position = position
        self._known: dict[tuple[str, str], float] = {}

    def of(self, name: str, kind: str) -> float:
        if (name, kind) not in self._known:
            seconds = self.costs.forward_s if kind == "F" else self.costs.backward_s
            graph = self._as_read(name)
            self._known[name, kind] = seconds(graph.op(name), graph, self.position)
        return self._known[name, kind]

    def _as_read(self, name: str) -> OpGraph:
        """The rank's graph with the inputs of an operator in the shapes they are read in."""
        graph, read = self.local.graph, self.local.gathered.get(name)
        if read is None:
            return graph
        tensors = {**graph.tensors}
        tensors.update((one, replace(tensors[one], shape=shape)) for one, shape in read.items())
        return replace(graph, tensors=tensors)


def _joined(steps: Sequence[Step]) -> Steps:
    """The same with computing between calls put together."""
    found: list[Step] = []
    seconds = 0.0
    for step in steps:
        seconds += step.seconds
        if step.calls:
            found.append(Step(seconds, step.calls))
            seconds = 0.0
    return (*found, Step(seconds))


def _ops(item: Item) -> Iterator[str]:
    if isinstance(item, Stretch):
        yield from (call.op.name for call in item.calls)
    elif not isinstance(item, Move):
        for inner in item.items:
            yield from _ops(inner)


def _part(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return replace(tensor, shape=shape)
