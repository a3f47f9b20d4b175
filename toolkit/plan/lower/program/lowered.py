"""A plan on the own executor: what one rank holds, and its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from toolkit.errors import ToolkitError, UsageError
from toolkit.hardware import Cluster, find_cluster
from toolkit.ir.graph import OpGraph
from toolkit.plan import subject
from toolkit.plan.lower.lowered import Batch, Lowered
from toolkit.plan.lower.program import move, reduce
from toolkit.plan.lower.program.executor import Left, StageRun
from toolkit.plan.lower.program.items import Move
from toolkit.plan.lower.program.kernel import Sources
from toolkit.plan.lower.program.move import Network
from toolkit.plan.lower.program.sides import message
from toolkit.plan.lower.program.walk import Walk
from toolkit.plan.lower.program.weights import Weight, axes_of, cut
from toolkit.plan.lower.recorder import Recorder
from toolkit.plan.plan import Plan
from toolkit.plan.tensors import Mask


class Program(Lowered):
    """Runs this rank's row of actions; see executor.py for what one action is."""

    rung = "program: own executor"

    def __init__(self, walk: Walk, module: nn.Module, mesh: DeviceMesh, recorder: Recorder) -> None:
        plan = walk.plan
        super().__init__(plan, recorder)
        self.walk = walk
        self.replica, self.rank, shift = _place(plan, dist.get_rank())
        self.device = next(module.parameters()).device
        groups = _groups(walk)
        mine = {ranks: group for ranks, group in groups.items() if dist.get_rank() in ranks}
        self.network = Network(shift, mine, _expected(walk, self.rank), self.device)
        self.weights = self._weights(module, mesh)
        self.parameters = {name: weight.parameter for name, weight in self.weights.items()}
        self.reductions = reduce.reductions(walk, self.rank)
        state = dict(module.named_buffers(remove_duplicate=False))
        self.buffers = {name: state[name] for name in walk.graph.tensors if name in state}
        self.sides = walk.sides
        left: Left = {}
        by_name = {
            name: weight for weight in self.weights.values() for name in (weight.exchange.tensor,)
        }
        self.stages = {
            stage: StageRun(
                walk.script(stage, self.rank), walk.written, by_name, self.network, self.sides, left
            )
            for stage in walk.written.held_by(self.rank)
        }

    def _weights(self, module: nn.Module, mesh: DeviceMesh) -> dict[str, Weight]:
        whole = dict(module.named_parameters())
        found = {}
        for tensor in self.walk.graph.parameters():
            held = self.walk.held[tensor.name]
            if self.rank in held:
                path = tensor.fqn or tensor.name
                axes = axes_of(tensor.name, held, self.rank, self.walk.written)
                found[path] = Weight(
                    path, whole[path], self.rank, held[self.rank], self.walk.weights[tensor.name],
                    mesh, axes,
                )  # fmt: skip
        return found

    # One step --------------------------------------------------------------------------------

    def step(self, batch: Batch) -> Tensor | None:
        pieces = self._pieces(batch)
        for weight in self.weights.values():
            weight.forget()
        scale = 1.0 / (self.plan.microbatches * self.plan.num_replicas)
        losses: list[Tensor] = []
        for action in self.walk.actions(self.rank):
            stage = self.stages[action.stage]
            with self.recorder.action(action):
                if action.kind == "F":
                    loss = stage.forward(action.microbatch, pieces[action.microbatch])
                    losses += [] if loss is None else [loss]
                elif stage.script.learns:
                    stage.backward(action.microbatch, scale)
            self.network.sweep()
        self._gradients()
        self.network.finish()
        return torch.stack(losses).mean() if losses else None

    def _pieces(self, batch: Batch) -> list[Sources]:
        """Where each microbatch of this rank's replica takes inputs and buffers from."""
        names = self.walk.graph.inputs
        if set(names) <= set(batch):
            given = {name: batch[name] for name in names}
        elif len(names) == len(batch):
            given = dict(zip(names, batch.values(), strict=True))
        else:
            raise UsageError(f"the model takes {', '.join(names)}, not {', '.join(batch)}")
        size, start = self.plan.microbatch, self.replica * self.plan.rank_batch

        def sources(first: int) -> Sources:
            held = {name: value[first : first + size] for name, value in given.items()}
            held.update(self.buffers)

            def part(name: str, mask: Mask) -> Tensor:
                if name not in held:
                    raise ToolkitError(f"the graph reads {name}, which the model does not have")
                whole = Mask(tuple((0, length) for length in held[name].shape))
                return cut(held[name], whole, mask)

            return part

        return [sources(start + index * size) for index in range(self.plan.microbatches)]

    def _gradients(self) -> None:
        """Sum up the gradients of weights over all who share them."""
        found: dict[str, Tensor] = {}
        for weight in self.weights.values():
            gradient = self._summed(weight)
            if gradient is not None:
                found[weight.exchange.tensor] = gradient
        for one in self.reductions:
            with self.recorder.span(f"reduce {one.unit or 'the rest'}", "all_reduce"):
                group = self.network.groups[one.ranks]
                found.update(_reduce({name: found[name] for name in one.weights}, group))
        _apart(found)
        for weight in self.weights.values():
            if weight.exchange.tensor in found:
                weight.parameter.grad = weight.outside(found[weight.exchange.tensor])
                weight.forget()

    def _summed(self, weight: Weight) -> Tensor | None:
        """The gradient of a weight as far as it is not left to a reduction."""
        exchange, adapter = weight.exchange, weight.exchange.backward
        if adapter is None:
            return None
        plain = reduce.is_plain(exchange)
        if weight.tiled and (plain or not adapter.communication):
            return torch.zeros_like(weight.local) if weight.gradient is None else weight.gradient
        held: dict[str, Tensor] = {}
        dtype = weight.local.dtype
        for name, (index, mask) in zip(adapter.inputs, exchange.shares, strict=True):
            slot = exchange.slots[index]
            if slot.rank == self.rank:
                value = weight.sums.get(slot)
                if value is None:
                    value = torch.zeros(slot.mask.shape, dtype=dtype, device=self.device)
                held[name] = cut(value, slot.mask, mask)
        tasks = self.sides.of(adapter, (), ("first",), self.rank)
        item = Move(0, self.rank, exchange, "all")
        move.run(
            adapter, ((n, task) for n, task in tasks if not plain or task.what == "local"),
            held, self.network, self.rank, dtype,
            lambda number, task: (message(item, number, task, gradient=True), -1),
        )  # fmt: skip
        output = adapter.outputs[[rank for rank, _ in exchange.made].index(self.rank)]
        if output not in held:  # what a rank reads into its all-reduce
            output = next(step.reads[step.ranks.index(self.rank)]
                          for step in adapter.communication if self.rank in step.ranks)  # fmt: skip
        return held[output]

    def global_loss(self, loss: Tensor | None) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        if loss is not None:
            total += loss.double() * self._share() / self.plan.num_replicas
        dist.all_reduce(total)
        return float(total)

    def _share(self) -> float:
        """What this rank's loss counts: ranks that computed the same count once together."""
        written = self.walk.written
        output = self.walk.graph.outputs[0]
        maker = self.walk.graph.producer[output]
        stage = self.walk.stages.own[output]
        works = written.works(stage, maker.name)
        part = written.parts[stage][maker.name][self.rank][0]
        return 1.0 / len(works[part.work])


def _place(plan: Plan, rank: int) -> tuple[int, int, int]:
    """(which replica, this rank's number in the first one, how far that is from this one)."""
    copies = [rank // plan.stride(axis) % plan.size(axis) for axis in ("replica", "data")]
    shift = copies[0] * plan.stride("replica") + copies[1] * plan.stride("data")
    return copies[0] * plan.size("data") + copies[1], rank - shift, shift


def _groups(walk: Walk) -> dict[tuple[int, ...], dist.ProcessGroup]:
    """Make every process group, on every rank in the same order."""
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}
    by_set: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for ranks in sorted(reduce.groups(walk)):
        key = tuple(sorted(ranks))
        if key not in by_set:
            by_set[key] = dist.new_group(list(key))
        made[ranks] = by_set[key]
    return made


def _expected(
    walk: Walk, rank: int
) -> Mapping[int, Sequence[tuple[move.Key, tuple[int, ...], torch.dtype]]]:
    """What every other rank sends to this one in a step, in the order it does."""
    found: dict[int, list[tuple[move.Key, tuple[int, ...], torch.dtype]]] = {}
    for other in walk.written.replica:
        for event in reduce.events(walk, other):
            key = event.key
            if event.task.what == "send" and key[0].target == rank and key[0].source == other:
                buffer = event.adapter.buffer[event.task.step.writes[event.task.place]]
                dtype = getattr(torch, walk.graph.tensors[event.tensor].dtype)
                found.setdefault(other, []).append((key, buffer.mask.shape, dtype))
    return found


def _reduce(gradients: Mapping[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Sum gradients of one dtype over a group, as one buffer that they are then views of."""
    flat = torch.cat([value.reshape(-1) for value in gradients.values()])
    dist.all_reduce(flat, group=group)
    pieces = flat.split([value.numel() for value in gradients.values()])
    return {
        name: piece.view(value.shape)
        for (name, value), piece in zip(gradients.items(), pieces, strict=True)
    }


def _apart(gradients: dict[str, Tensor]) -> None:
    """Copy gradients that are one tensor, as of two weights added to one sum: each is written to
    on its own later.
    """
    seen: set[int] = set()
    for name, value in gradients.items():
        if value.data_ptr() in seen:
            gradients[name] = value.clone()
        seen.add(value.data_ptr())


def cluster_of(plan: Plan) -> Cluster:
    """Return the cluster whose prices chose the plan's exchanges; the CPU's where it has no row."""
    try:
        found = find_cluster(plan.provenance.cluster)
    except UsageError:
        return find_cluster(f"cpux{plan.num_ranks}")
    return found if found.num_devices >= plan.num_ranks else find_cluster(f"cpux{plan.num_ranks}")


def lower(
    plan: Plan,
    module: nn.Module,
    mesh: DeviceMesh,
    recorder: Recorder,
    example: Batch,
    graph: OpGraph | None = None,
) -> Lowered:
    """Return what this rank runs of `plan` on the own executor.

    `module` is the whole model with equal weights on every rank; `graph` is its trace (any batch),
    taken again when not given. Raises UsageError for a plan this executor does not run.
    """
    if graph is None:
        dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
        graph = subject.load(plan.provenance.model, dtype=dtype, **plan.provenance.sizes).graph
    return Program(Walk(plan, graph, cluster_of(plan)), module, mesh, recorder)
