"""Operators on one rank's shapes: seconds and saved bytes of a part, priced like the whole.

A segment of the chain is cut out as a graph of its own, and one operator's tensors at a time are
given the shapes that a rank sees; the formulas, the roofline and the rules for what is saved are
those of every other prediction.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from toolkit.cost import roofline
from toolkit.cost.calibration import Calibration
from toolkit.cost.work import Work
from toolkit.hardware import Device
from toolkit.ir import backward, formulas
from toolkit.ir.graph import Op, OpGraph, Tensor
from toolkit.plan.predict.alive import is_put_off
from toolkit.plan.predict.costs import done
from toolkit.plan.search.layouts import Axis, Layout, Way, local_shape, share

_ENTRY = "entry"


@dataclass(frozen=True)
class Part:
    """What a part of an operator takes and keeps; `weight_s` is what can be put off of backward:
    gradients of Linears' weights.
    """

    forward_s: float
    backward_s: float
    weight_s: float
    kept: tuple[tuple[str, int], ...]


def cut_out(graph: OpGraph, ops: Sequence[Op], name: str) -> OpGraph:
    """Return the operators as a graph of their own; what they read from outside is made by an
    operator in front.
    """
    made = {tensor for op in ops for tensor in op.outputs}
    names = dict.fromkeys(tensor for op in ops for tensor in (*op.inputs, *op.outputs))
    for tensor in list(names):
        names.setdefault(graph.tensors[tensor].storage)
    tensors = {tensor: graph.tensors[tensor] for tensor in names}
    entering = tuple(
        tensor for tensor, data in tensors.items()
        if data.role == "activation" and tensor not in made
    )  # fmt: skip
    entry = Op(_ENTRY, "aten.empty.memory_format", {}, 0, entering, "")
    inside = {op.name for op in ops}
    outside = tuple(
        tensor
        for tensor in names
        if tensor in made
        and (
            tensor in graph.outputs
            or any(reader.name not in inside for reader in graph.consumers[tensor])
        )
    )
    return OpGraph(
        name=name,
        ops=(entry, *ops),
        tensors=tensors,
        inputs=tuple(t for t, data in tensors.items() if data.role == "input"),
        outputs=outside,
        modules=graph.modules,
        training=graph.training,
    )


@dataclass
class Parts:
    """Prices parts of the operators of one segment on one device. `priced` is what is known of the
    model's operators by their local shapes: other meshes and microbatches give the same ones.
    """

    graph: OpGraph
    axes: tuple[Axis, ...]
    device: Device
    kernels: backward.Kernels
    calibration: Calibration | None = None
    priced: dict[object, Part] = field(default_factory=dict, repr=False)
    _seen: dict[object, Part] = field(default_factory=dict, repr=False)

    def part(self, op: Op, way: Way) -> Part:
        """Return the seconds and saved bytes of one rank's part of `op`."""
        key = (op.name, way.reads, way.makes)
        if key not in self._seen:
            local = self.graph if way.replicated else self._local(op, way)
            around = [local.tensors[name] for name in (*op.inputs, *op.outputs)]
            storages = [local.tensors[one.storage].shape for one in around if one.is_view]
            sizes = (op.name, self.device.name, *(one.shape for one in around), *storages)
            if sizes not in self.priced:
                self.priced[sizes] = self._priced(op, local)
            self._seen[key] = self.priced[sizes]
        return self._seen[key]

    def _priced(self, op: Op, local: OpGraph) -> Part:
        forward_s = self._seconds((done(op, local, formulas.work(op, local)),))
        backward_s = self._backward_s(op, local)
        weight_s = 0.0
        if backward_s and is_put_off(op, local):
            weight = formulas.tensor_of(op, local, "weight")
            frozen = _with(local, {weight.name: replace(weight, requires_grad=False)})
            weight_s = backward_s - self._backward_s(op, frozen)
        kept: tuple[tuple[str, int], ...] = ()
        if op.name in local.differentiated:
            kept = tuple(backward.kept(op, local, kernels=self.kernels))
        return Part(forward_s, backward_s, max(0.0, weight_s), kept)

    def _backward_s(self, op: Op, graph: OpGraph) -> float:
        works = backward.work(op, graph, kernels=self.kernels)
        return self._seconds([done(op, graph, work) for work in works])

    def _seconds(self, works: Sequence[Work]) -> float:
        return sum(
            roofline.seconds(work, self.device, calibration=self.calibration) for work in works
        )

    def _local(self, op: Op, way: Way) -> OpGraph:
        changed: dict[str, Tensor] = {}
        pairs = [*zip(op.inputs, way.reads, strict=True), *zip(op.outputs, way.makes, strict=True)]
        for name, layout in pairs:
            tensor = self.graph.tensors[name]
            changed[name] = replace(tensor, shape=local_shape(tensor.shape, layout, self.axes))
            if tensor.is_view:
                changed.setdefault(tensor.storage, self._storage(tensor, layout))
        return _with(self.graph, changed)

    def _storage(self, view: Tensor, layout: Layout) -> Tensor:
        """The memory a local view lies in: as much smaller as the view, unless it is expanded."""
        owner = self.graph.tensors[view.storage]
        parts = share(layout, self.axes) if view.numel <= owner.numel else 1
        return replace(owner, shape=(owner.numel // parts,))


def _with(graph: OpGraph, changed: Mapping[str, Tensor]) -> OpGraph:
    """Return the graph with some tensors changed, unchecked: this is done thousands of times.

    What was derived from names alone stays; who is differentiated depends on requires_grad.
    """
    made = copy.copy(graph)
    object.__setattr__(made, "tensors", {**graph.tensors, **changed})
    if any(tensor.requires_grad != graph.tensors[name].requires_grad
           for name, tensor in changed.items()):  # fmt: skip
        made.__dict__.pop("differentiated", None)
    return made
