"""Program: a plan written with SuperScaler's three primitives (arXiv 2301.08984, section 3).

`trans` divides operators, `assign` places them, `order` says what runs before what; `freeze`
checks that it can run, `verify` that it computes what the model does. What is communicated follows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

from toolkit.errors import UsageError, unknown_name
from toolkit.hardware.cluster import Cluster
from toolkit.ir.dims import Annotation
from toolkit.ir.graph import OpGraph
from toolkit.plan.program import check, depend, rules, select
from toolkit.plan.program.frozen import FrozenProgram, SubOp
from toolkit.plan.program.part import Algorithm, Part, Split, divide
from toolkit.plan.tensors import Mask, PTensor, VTensor

if TYPE_CHECKING:
    import torch

    from toolkit.plan.program.local import Comparison

# A part, the name of one, or the name of an operator that is still whole.
Which = Part | str
_SHOWN = 4


class Program:
    """A plan for `graph` in the making: every operator begins as one whole part, on no device."""

    def __init__(self, graph: OpGraph) -> None:
        self.graph = graph
        self._annotations: dict[str, Annotation] = {}
        self._parts = {op.name: Part(op.name) for op in graph.ops}
        self._divided: dict[str, tuple[Part, ...]] = {}
        self._devices: dict[str, int] = {}
        self._recompute: dict[str, str] = {}
        self._order: list[tuple[str, str]] = []

    # Choosing -------------------------------------------------------------------------------

    def ops(self, *patterns: str, kind: str = "") -> tuple[Part, ...]:
        """Return the parts there are now of the operators that match, in execution order.

        See `select.ops` for patterns: `"blocks.*.ffn.up"`, `"blocks.0"`, `kind="linear"`.
        """
        chosen = select.ops(self.graph, patterns, kind)
        return tuple(part for op in chosen for part in self._leaves(op.name))

    def flow(self, *starts: str, dim: int) -> dict[str, str]:
        """Follow a dim of tensors through the graph; return operator -> its name for the dim.

        `starts` are inputs, parameters, or patterns of operators whose outputs are meant: `dim` is
        0 for the batch of an input, -1 for the hidden dim that a linear layer makes.
        """
        return select.flow(self.graph, lambda op: self.annotation(op.name), starts, dim, halos=True)

    def annotation(self, op: str) -> Annotation:
        """Return along which dims an operator can be divided; printed, it reads like an einsum."""
        if op not in self._annotations:
            self._annotations[op] = rules.annotation(self.graph.op(op), self.graph)
        return self._annotations[op]

    def device(self, part: Which) -> int:
        """Return where a part was placed; UsageError when it was not."""
        name = self._part(part).name
        if name not in self._devices:
            raise UsageError(f"{name} has no device", remedy="assign it to one")
        return self._devices[name]

    def recomputed(self, part: Which) -> bool:
        """Return whether a part is run again before its backward."""
        return self._part(part).name in self._recompute

    def ordered(self) -> tuple[tuple[Part, Part], ...]:
        """Return which parts were asked to run before which."""
        return tuple(
            dict.fromkeys(
                pair
                for first, then in self._order
                for pair in itertools.product(self._leaves(first), self._leaves(then))
            )
        )

    # The three primitives -------------------------------------------------------------------

    def trans(self, part: Which, algorithm: Algorithm) -> tuple[Part, ...]:
        """op-trans: replace a part by functionally equivalent parts, and return those.

        They inherit its device and its place in the order. Nothing else changes: what others read
        and make stays, and data is moved to match.
        """
        old = self._part(part)
        made = divide(old, self.annotation(old.op), algorithm)
        if made == (old,):
            return made
        del self._parts[old.name]
        self._divided[old.name] = made
        for new in made:
            self._parts[new.name] = new
            if old.name in self._devices:
                self._devices[new.name] = self._devices[old.name]
            if old.name in self._recompute:
                self._recompute[new.name] = self._recompute[old.name]
        return made

    def assign(self, parts: Which | Iterable[Which], device: int) -> None:
        """op-assign: place parts on a device; their backward follows them."""
        if device < 0:
            raise UsageError(f"there is no device {device}", remedy="count devices from 0")
        for part in self._each(parts):
            self._devices[part.name] = device

    def order(self, first: Which | Iterable[Which], then: Which | Iterable[Which]) -> None:
        """op-order: every part of `first` runs before any part of `then` begins."""
        for one, other in itertools.product(list(self._each(first)), list(self._each(then))):
            if one == other:
                raise UsageError(f"{one.name} cannot run before itself")
            self._order.append((one.name, other.name))

    # Made of them ---------------------------------------------------------------------------

    def co_shard(
        self, parts: Iterable[Which], dims: Mapping[str, str], num: int
    ) -> tuple[tuple[Part, ...], ...]:
        """Divide parts along `dims` (operator -> identifier, see `flow`); return the shards.

        Shard i is the i-th part of each. All belong on one device, run one shard after another,
        and are recomputed in backward: only one shard's activations are alive at a time.
        """
        chosen = list(self._each(parts))
        left_out = [part.op for part in chosen if part.op not in dims]
        if not chosen or left_out:
            raise UsageError(
                f"co-shard has no dim for {', '.join(left_out[:_SHOWN]) or 'anything'}",
                remedy="give the parts of the operators that the flow follows",
            )
        made = [self.trans(part, Split(dims[part.op], num)) for part in chosen]
        shards = tuple(zip(*made, strict=True))
        family = f"{chosen[0].name} to {chosen[-1].name}"
        for index, shard in enumerate(shards):
            for part in shard:
                self._recompute[part.name] = f"{family} {index}/{num}"
        first, last = self._ends(chosen)
        for before, after in itertools.pairwise(shards):
            self.order([before[index] for index in last], [after[index] for index in first])
        return shards

    # The result -----------------------------------------------------------------------------

    def freeze(self) -> FrozenProgram:
        """Return the program as checked data.

        Raises UsageError naming operators without a device or whose replicas differ, and
        InfeasibleError naming those that wait for each other.
        """
        parts = [part for op in self.graph.ops for part in self._leaves(op.name)]
        missing = [part.name for part in parts if part.name not in self._devices]
        if missing:
            shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
            raise UsageError(
                f"{len(missing)} of {len(parts)} parts have no device: {shown}",
                remedy="assign each to one",
            )
        for op in self.graph.ops:
            self._check_replicas(op.name)
        sub_ops = tuple(self._sub_op(part) for part in parts)
        order = tuple((one.name, other.name) for one, other in self.ordered())
        sources = tuple(t.name for t in self.graph.tensors.values() if t.role != "activation")
        made = FrozenProgram(
            name=self.graph.name,
            digest=self.graph.digest,
            sub_ops=sub_ops,
            order=order,
            sources=sources,
            weights=tuple(t.name for t in self.graph.parameters() if t.requires_grad),
            outputs=self.graph.outputs,
        )
        check.check(made)
        ready = depend.in_order(sub_ops, made.dependencies, made.exchanges)
        return replace(made, sub_ops=ready)

    def verify(
        self, tensors: Mapping[str, torch.Tensor], cluster: Cluster | None = None
    ) -> Comparison:
        """Run the program here, part by part on virtual devices, and the model whole; compare
        every output and the gradient of every parameter.

        `tensors` are the graph's parameters and inputs by name. Data moves by the adapters that
        `cluster` (CPU ranks when not given) would use.
        """
        from toolkit.plan.program import local

        return local.verify(self.graph, self.freeze(), tensors, cluster)

    # Inside ---------------------------------------------------------------------------------

    def _leaves(self, name: str) -> Iterator[Part]:
        """The parts that the part called `name` has become."""
        if name in self._parts:
            yield self._parts[name]
            return
        for part in self._divided[name]:
            yield from self._leaves(part.name)

    def _each(self, parts: Which | Iterable[Which]) -> Iterator[Part]:
        for part in [parts] if isinstance(parts, (Part, str)) else parts:
            yield self._part(part)

    def _part(self, part: Which) -> Part:
        name = part if isinstance(part, str) else part.name
        if name in self._parts:
            return self._parts[name]
        if name in self._divided:
            into = [made.name for made in self._leaves(name)]
            raise UsageError(
                f"{name} was divided into {', '.join(into[:_SHOWN])}",
                remedy="use these: trans returns them, and ops finds them",
            )
        raise unknown_name(f"part or operator of {self.graph.name}", name, self._parts)

    def _check_replicas(self, op: str) -> None:
        """Refuse replicas that were divided differently: in backward they would count twice."""
        found = self.annotation(op)
        works = {part.work: part for part in self._leaves(op)}
        shares = [
            math.prod(
                (Fraction(high - low, found.sizes[name]) for name, (low, high) in p.region.items()),
                start=Fraction(1),
            )
            for p in works.values()
        ]
        if sum(shares) != 1:
            names = [part.name for part in self._leaves(op)]
            raise UsageError(
                f"replicas of {op} are divided differently: {', '.join(names[:_SHOWN])}",
                remedy="divide replicas alike and in the same order, or replicate last",
            )

    def _ends(self, parts: Sequence[Part]) -> tuple[list[int], list[int]]:
        """Which of some parts read nothing that others make, and which make nothing they read."""
        ops = [self.graph.op(part.op) for part in parts]
        made = {name for op in ops for name in op.outputs}
        read = {name for op in ops for name in op.inputs}
        first = [index for index, op in enumerate(ops) if made.isdisjoint(op.inputs)]
        return first, [index for index, op in enumerate(ops) if read.isdisjoint(op.outputs)]

    def _sub_op(self, part: Part) -> SubOp:
        op, found = self.graph.op(part.op), self.annotation(part.op)
        device = self._devices[part.name]

        def view(name: str, mask: Mask) -> VTensor:
            tensor = self.graph.tensors[name]
            logical = PTensor(name, tensor.shape, tensor.dtype)
            return VTensor(logical, mask, device, part.work)

        return SubOp(
            part.name,
            part.op,
            device,
            tuple(view(op.inputs[place], mask) for place, mask in part.reads(found)),
            tuple(map(view, op.outputs, part.outputs(found))),
            dict(part.region),
            part.op in self.graph.differentiated,
            self._recompute.get(part.name, ""),
        )
