"""Backward of a frozen program, part by part: the mirror of what forward moves.

Every part's gradients are computed from its own slices and the gradient delivered to it, so what
comes out right here needs no more than the adapters of plan.materialize.gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from toolkit.hardware.cluster import Cluster
from toolkit.ir import interpret
from toolkit.ir.graph import OpGraph
from toolkit.plan.materialize import interpret as movement
from toolkit.plan.materialize import materialize
from toolkit.plan.materialize.gradient import mirror
from toolkit.plan.program import rules
from toolkit.plan.program.depend import View
from toolkit.plan.program.frozen import FrozenProgram, SubOp
from toolkit.plan.tensors import Mask, PTensor, VTensor

Tensors = Mapping[str, torch.Tensor]
_OUTSIDE = ("", 0)  # who reads an output of the whole


def seeds(graph: OpGraph, outputs: Tensors) -> dict[str, torch.Tensor]:
    """Return a random gradient for every output that has one, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(value.shape, dtype=torch.float64, generator=generator).to(value.dtype)
        for name, value in outputs.items()
        if graph.tensors[name].requires_grad
    }


def whole(graph: OpGraph, tensors: Tensors, given: Tensors) -> dict[str, torch.Tensor]:
    """Return the gradients of parameters (and of inputs that have one) of the whole model."""
    wanted = [name for name, tensor in tensors.items() if _trained(graph, name, tensor)]
    leaves = {name: tensors[name].detach().clone().requires_grad_() for name in wanted}
    # A parameter may be written in place, which a leaf must not be.
    held = {**tensors, **{name: leaf.clone() for name, leaf in leaves.items()}}
    with torch.enable_grad():
        outputs = dict(zip(graph.outputs, interpret.run(graph, held), strict=True))
        roots = [outputs[name] for name in given]
        found = torch.autograd.grad(
            roots, list(leaves.values()), list(given.values()), allow_unused=True
        )
    return {
        name: torch.zeros_like(leaves[name]) if value is None else value
        for name, value in zip(wanted, found, strict=True)
    }


def _trained(graph: OpGraph, name: str, tensor: torch.Tensor) -> bool:
    known = graph.tensors.get(name)
    return known is not None and known.requires_grad and tensor.is_floating_point()


class Backward:
    """The gradients that parts have made so far."""

    def __init__(
        self,
        graph: OpGraph,
        program: FrozenProgram,
        inputs: Mapping[str, Sequence[torch.Tensor]],
        cluster: Cluster,
    ) -> None:
        """`inputs` are what each sub-operator read in forward."""
        self.graph = graph
        self.cluster = cluster
        self.inputs = inputs
        self.parts: dict[str, list[SubOp]] = {}
        self.readers: dict[str, dict[View, VTensor]] = {}
        self.made: dict[View, torch.Tensor] = {}
        for sub_op in program.sub_ops:
            if sub_op.op in graph.differentiated:
                self.parts.setdefault(sub_op.op, []).append(sub_op)
                for index, view in enumerate(sub_op.inputs):
                    # One operator that reads a tensor twice adds to its gradient twice.
                    named = replace(view, op=f"{sub_op.work}:{index}")
                    readers = self.readers.setdefault(view.tensor.name, {})
                    readers[sub_op.name, index] = named

    def run(self, given: Tensors) -> dict[str, torch.Tensor]:
        """Return the gradients of parameters when the outputs' are `given`."""
        for name, value in given.items():
            self._seed(name, value)
        for op in reversed(self.graph.ops):
            parts = self.parts.get(op.name, [])
            arrived: dict[str, dict[int, torch.Tensor]] = {part.name: {} for part in parts}
            for index, name in enumerate(op.outputs):
                if self.graph.tensors[name].requires_grad and parts:
                    needed = [part.outputs[index] for part in parts]
                    for part, value in zip(parts, self._deliver(name, needed), strict=True):
                        arrived[part.name][index] = value
            for part in parts:
                self._call(part, arrived[part.name])
        return {
            tensor.name: self._deliver(tensor.name, [_everything(tensor.name, self.graph, 0)])[0]
            for tensor in self.graph.tensors.values()
            if tensor.role != "activation" and tensor.requires_grad
        }

    def _seed(self, name: str, value: torch.Tensor) -> None:
        view = replace(_everything(name, self.graph, 0), op="outside")
        self.readers.setdefault(name, {})[_OUTSIDE[0], len(self.made)] = view
        self.made[_OUTSIDE[0], len(self.made)] = value

    def _deliver(self, name: str, needed: Sequence[VTensor]) -> list[torch.Tensor]:
        """The gradient of what `needed` views hold, from all who read the tensor."""
        readers = {
            view: one for view, one in self.readers.get(name, {}).items() if view in self.made
        }
        keys = list(readers)
        dtype = getattr(torch, self.graph.tensors[name].dtype)
        views = mirror(needed[0].tensor, needed, list(readers.values()))
        given = []
        for producer, index in zip(views.producers, views.of, strict=True):
            value = self.made[keys[index]].to(torch.float64)
            dtype = self.made[keys[index]].dtype
            held = readers[keys[index]].mask
            given.append(value[tuple(slice(*span) for span in producer.mask.within(held))].numpy())
        adapter = materialize(
            views.tensor, views.producers, views.consumers, self.cluster, absent="zero"
        )
        return [torch.tensor(value).to(dtype) for value in movement.run(adapter, given)]

    def _call(self, part: SubOp, arrived: Mapping[int, torch.Tensor]) -> None:
        """Run a part again with gradients, and keep what it makes of those that arrived."""
        op = self.graph.op(part.op)
        found = rules.annotation(op, self.graph)
        masks = [view.mask for view in part.outputs]
        wanted = [
            index
            for index, view in enumerate(part.inputs)
            if self.graph.tensors[view.tensor.name].requires_grad
        ]
        inputs = [value.detach().clone() for value in self.inputs[part.name]]
        for index in wanted:
            inputs[index].requires_grad_()
        with torch.enable_grad():
            outputs = rules.run(op, found, part.region, inputs, masks)
            roots = [index for index in arrived if outputs[index].requires_grad]
            values = torch.autograd.grad(
                [outputs[index] for index in roots],
                [inputs[index] for index in wanted],
                [arrived[index] for index in roots],
                allow_unused=True,
            )
        for index, value in zip(wanted, values, strict=True):
            made = torch.zeros_like(inputs[index]) if value is None else value
            self.made[part.name, index] = made


def _everything(name: str, graph: OpGraph, device: int) -> VTensor:
    tensor = graph.tensors[name]
    logical = PTensor(name, tensor.shape, tensor.dtype)
    return VTensor(logical, Mask.whole(tensor.shape), device)
