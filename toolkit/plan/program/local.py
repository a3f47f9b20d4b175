"""Run a frozen program with torch in one process, on virtual devices, and compare with the model.

Each sub-operator is called with its slices alone, and data moves by the adapters that a cluster
would use: what comes out right here was divided right and is communicated right. Recomputation, and
the time that anything takes, play no part here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from toolkit.errors import ToolkitError, UsageError
from toolkit.hardware import find_cluster
from toolkit.hardware.cluster import Cluster
from toolkit.ir import interpret
from toolkit.ir.graph import OpGraph
from toolkit.plan.materialize import interpret as movement
from toolkit.plan.program import depend, gradient, rules
from toolkit.plan.program.depend import Exchange, View
from toolkit.plan.program.frozen import FrozenProgram, SubOp
from toolkit.plan.program.gradient import Tensors
from toolkit.plan.tensors import Mask, VTensor


@dataclass(frozen=True)
class Comparison:
    """How far outputs and gradients are from the whole model's, each relative to its largest
    element; gradients to at least a thousandth of the largest of all.
    """

    outputs: Mapping[str, float]
    gradients: Mapping[str, float]

    @property
    def max_error(self) -> float:
        return max((*self.outputs.values(), *self.gradients.values()), default=0.0)


def verify(
    graph: OpGraph,
    program: FrozenProgram,
    tensors: Tensors,
    cluster: Cluster | None = None,
) -> Comparison:
    """Run `program` and `graph` on the same tensors (by name); compare outputs and gradients.

    Raises UsageError when the program is not of this graph, a tensor is missing, the cluster has
    too few devices, or an operator draws random numbers.
    """
    if program.digest != graph.digest:
        raise UsageError(f"the program is of another graph than {graph.name}")
    num = max(program.devices, default=0) + 1
    cluster = cluster or find_cluster(f"cpux{num}")
    if num > cluster.num_devices:
        raise UsageError(
            f"the program uses {num} devices and {cluster.name} has {cluster.num_devices}"
        )
    missing = [name for name in program.sources if name not in tensors and graph.consumers[name]]
    if missing:
        raise UsageError(f"{graph.name} needs the tensors {', '.join(missing)}")
    with torch.no_grad():
        given = {name: tensor.detach() for name, tensor in tensors.items()}
        running = _Run(graph, program, given, cluster)
        found = running.outputs()
        held = {name: tensor.clone() for name, tensor in given.items()}
        whole = dict(zip(graph.outputs, interpret.run(graph, held), strict=True))
    outputs = {name: _error(found[name], whole[name]) for name in graph.outputs}
    return Comparison(outputs, _gradients(graph, program, running, whole))


def _gradients(
    graph: OpGraph, program: FrozenProgram, running: _Run, outputs: Tensors
) -> dict[str, float]:
    arriving = gradient.seeds(graph, outputs)
    if not arriving:
        return {}
    whole = gradient.whole(graph, running.tensors, arriving)
    backward = gradient.Backward(graph, program, running.inputs, running.cluster)
    found = backward.run(arriving)
    largest = max((float(value.abs().max()) for value in whole.values()), default=0.0)
    return {name: _error(found[name], whole[name], largest / 1000) for name in whole}


def _error(found: torch.Tensor, whole: torch.Tensor, least: float = 0.0) -> float:
    if found.shape != whole.shape:
        raise ToolkitError(f"an output has shape {tuple(found.shape)}, not {tuple(whole.shape)}")
    if not whole.numel():
        return 0.0
    one, other = found.to(torch.float64), whole.to(torch.float64)
    scale = max(float(other.abs().max()), least)
    return float((one - other).abs().max()) / (scale or 1.0)


class _Run:
    """What has been made, and what has been delivered, so far."""

    def __init__(
        self,
        graph: OpGraph,
        program: FrozenProgram,
        tensors: Tensors,
        cluster: Cluster,
    ) -> None:
        self.graph = graph
        self.program = program
        self.tensors = tensors
        self.cluster = cluster
        self.made: dict[View, torch.Tensor] = {}
        self.delivered: dict[View, torch.Tensor] = {}
        self.inputs: dict[str, list[torch.Tensor]] = {}

    def outputs(self) -> dict[str, torch.Tensor]:
        supplies = {
            view: one for one in self.program.exchanges for some in one.readers for view in some
        }
        for sub_op in self.program.sub_ops:
            for index in range(len(sub_op.inputs)):
                exchange = supplies.get((sub_op.name, index))
                if exchange and (sub_op.name, index) not in self.delivered:
                    self._deliver(exchange)
            self._call(sub_op)
        makers = depend.producers(self.program.sub_ops)
        return {name: self._whole(name, makers.get(name, {})) for name in self.program.outputs}

    def _deliver(self, exchange: Exchange) -> None:
        for views, value in zip(exchange.readers, self._moved(exchange), strict=True):
            for view in views:
                self.delivered[view] = value

    def _moved(self, exchange: Exchange) -> list[torch.Tensor]:
        """What each consumer of an exchange gets."""
        adapter = exchange.adapter(self.cluster)
        made = [self.made[view] for view in exchange.sources]
        given = [value.to(torch.float64).numpy() for value in made]
        values = movement.run(adapter, given)
        return [torch.tensor(value).to(made[0].dtype) for value in values]

    def _call(self, sub_op: SubOp) -> None:
        op = self.graph.op(sub_op.op)
        inputs = self.inputs[sub_op.name] = []
        for index, view in enumerate(sub_op.inputs):
            if view.tensor.name in self.program.sources:
                inputs.append(_part(self.tensors[view.tensor.name], view.mask))
            else:
                inputs.append(self.delivered[sub_op.name, index])
        found = rules.annotation(op, self.graph)
        masks = [view.mask for view in sub_op.outputs]
        values = rules.run(op, found, sub_op.region, inputs, masks)
        for index, (value, mask) in enumerate(zip(values, masks, strict=True)):
            if tuple(value.shape) != mask.shape:
                raise ToolkitError(
                    f"{sub_op.name} made shape {tuple(value.shape)} and should have made {mask}"
                )
            self.made[sub_op.name, index] = value

    def _whole(self, name: str, views: Mapping[View, VTensor]) -> torch.Tensor:
        """An output, put together on the device of the first that makes some of it."""
        if name in self.program.sources:
            return self.tensors[name]
        first = next(iter(views.values()))
        everything = VTensor(first.tensor, Mask.whole(first.tensor.shape), first.rank)
        return self._moved(depend.exchange(views, list(views), {everything: ()}))[0]


def _part(tensor: torch.Tensor, mask: Mask) -> torch.Tensor:
    """A part of a source; of partial sums the first gets the value, the others add nothing."""
    part = tensor[tuple(slice(low, high) for low, high in mask.box)]
    return part.clone() if mask.chunk.low == 0 else torch.zeros_like(part)
