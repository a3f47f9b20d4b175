"""A program as data: sub-operators with their views and devices, order, and what follows from them.

Dependencies, exchanges of data and their adapters are derived, never written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx

from toolkit.hardware.cluster import Cluster
from toolkit.plan.materialize import Adapter, Reducer, reducers
from toolkit.plan.program import depend
from toolkit.plan.program.depend import Exchange
from toolkit.plan.tensors import Interval, VTensor


@dataclass(frozen=True)
class SubOp:
    """A part of operator `op`, and what it sees of each input and makes of each output. An input
    that is read over its end (see ir.dims.Halo) is several views, one after another.

    `region` is the interval of each dim identifier that was split. Backward runs on the same
    device, if there is one. Parts with the same `recompute` are run again, together, before theirs.
    """

    name: str
    op: str
    device: int
    inputs: tuple[VTensor, ...]
    outputs: tuple[VTensor, ...]
    region: Mapping[str, Interval]
    has_backward: bool = False
    recompute: str = ""

    @property
    def work(self) -> str:
        """The name that replicas share."""
        return self.name.partition("#")[0]


@dataclass(frozen=True)
class FrozenProgram:
    """A program that can run: every operator placed, every view made by someone, no cycle.

    `sub_ops` are in an order in which they can run. `sources` are the tensors that every device
    has its parts of (parameters, inputs), `weights` those that are trained; `digest` is that of the
    graph.
    """

    name: str
    digest: str
    sub_ops: tuple[SubOp, ...]
    order: tuple[tuple[str, str], ...]
    sources: tuple[str, ...]
    weights: tuple[str, ...]
    outputs: tuple[str, ...]

    @cached_property
    def sub_op(self) -> Mapping[str, SubOp]:
        """Sub-operators by name."""
        return {sub_op.name: sub_op for sub_op in self.sub_ops}

    @property
    def devices(self) -> tuple[int, ...]:
        return tuple(sorted({sub_op.device for sub_op in self.sub_ops}))

    @cached_property
    def dependencies(self) -> nx.DiGraph:
        """Sub-operators (names); an edge's `why` is the tensors that flow, or "order"."""
        return depend.dependencies(self.sub_ops, self.order)

    @cached_property
    def exchanges(self) -> tuple[Exchange, ...]:
        """What moves between sub-operators, in an order in which it can."""
        return depend.exchanges(self.sub_ops, self.dependencies)

    def adapters(self, cluster: Cluster) -> tuple[Adapter, ...]:
        """Return the adapters that communicate on `cluster`; times are predicted."""
        found = (exchange.adapter(cluster) for exchange in self.exchanges if exchange.crosses)
        return tuple(adapter for adapter in found if adapter.communication)

    def communication(self, cluster: Cluster) -> str:
        """Return what is communicated forward, in words: one line an exchange and kind."""
        found = self.adapters(cluster)
        return "\n".join(map(str, found)) if found else "nothing is communicated"

    def reducers(self, cluster: Cluster, *, sharded: bool = False) -> tuple[Reducer, ...]:
        """Return over which devices the gradients of weights are summed; see materialize.reducers.

        Raises InfeasibleError when operators that share a weight are not replicated alike.
        """
        readers: dict[str, list[VTensor]] = {}
        for sub_op in self.sub_ops:
            for index, view in enumerate(sub_op.inputs if sub_op.has_backward else ()):
                # One operator that reads a weight twice adds to its gradient twice.
                named = dataclasses.replace(view, op=f"{sub_op.work}:{index}")
                readers.setdefault(view.tensor.name, []).append(named)
        found = (
            reducers(readers[name][0].tensor, readers[name], cluster, sharded=sharded)
            for name in self.weights
            if name in readers
        )
        return tuple(reducer for several in found for reducer in several)

    def to_body(self) -> dict[str, Any]:
        """Return the program as a JSON value."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_body(body: Any) -> FrozenProgram:
        """Build a program from the JSON value of `to_body`; raises UsageError unless it can run."""
        from pydantic import TypeAdapter

        from toolkit.plan.program import check

        made = TypeAdapter(FrozenProgram).validate_python(body)
        check.check(made)
        return made
