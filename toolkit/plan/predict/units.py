"""What the data and replica axes do with parameters: gather, reduce, update a share.

Equations, for m microbatches, n ranks along `data` and r along `replica` (checked against a count
of what is really called):
- replicate: one all-reduce a unit over r n ranks, in the last backward (Li et al. 2020).
- shard_optimizer (ZeRO-1, Rajbhandari et al. 2020): one reduce-scatter a unit in the last backward;
  after the update, one all-gather. A unit is one flat buffer padded to a multiple of n.
- shard_gradients (ZeRO-2): as before, with a reduce-scatter in every microbatch's backward.
- shard (FSDP2, Zhao et al. 2023): 2m all-gathers a block (forward, and again in backward) and m of
  the root, which stays gathered between the two; one reduce-scatter a unit. Each parameter is
  padded along dim 0 to a multiple of n.
- with r > 1 what was reduce-scattered is then all-reduced over the replicas.
- what is replicated, and ZeRO-1's, is reduced in memory by ranks on one machine's CPUs, in the same
  calls, after the last backward (lower/shared.py).

With the optimizer on the host (Ren et al. 2021, arXiv 2101.06840), what a rank updates goes down
when it is reduced and comes up when it is updated, once a step; the host keeps a copy of it, its
gradients and moments. With parameters on the host (FSDP2's CPUOffloadPolicy), a shard comes up for
every gather and its gradients go down with every reduction; the host keeps the only ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from toolkit.ir.graph import OpGraph, Tensor, item_bytes
from toolkit.plan import chain
from toolkit.plan.plan import DATA_WAYS, How, Plan
from toolkit.plan.predict.costs import GATHER, REDUCE, Call, Costs


@dataclass(frozen=True)
class Unit:
    """Parameters that one rank gathers and reduces together, and the calls that takes.

    `held_bytes` are kept of the parameters at all times; `whole_bytes` is their size gathered
    (0 where they are never divided), `gradient_bytes` that of their whole gradients and
    `shard_bytes` what is kept of those once reduced; `updated_bytes` are updated here. The host
    keeps `host_bytes` of parameters; `down` and `up` are the copies around an update there, the
    first beside the backward when `lands`.
    """

    name: str
    parameters: tuple[Tensor, ...]
    held_bytes: int
    gradient_bytes: int
    shard_bytes: int
    updated_bytes: int
    whole_bytes: int = 0
    gather: tuple[Call, ...] = ()
    reduce: tuple[Call, ...] = ()
    each_microbatch: bool = False
    after_update: tuple[Call, ...] = ()
    reserved_bytes: int = 0  # gradients in buffers that are there all along
    buffer_bytes: int = 0  # and those that every backward fills and empties
    host_bytes: int = 0
    down: tuple[Call, ...] = ()
    up: tuple[Call, ...] = ()
    lands: bool = False

    @property
    def reserves(self) -> bool:
        return bool(self.reserved_bytes)


def way(plan: Plan) -> How | None:
    """Return how the plan's parameters lie over the data axis; None where nothing says so."""
    return next((how for how in DATA_WAYS if plan.placed(how)), None)


def units(
    plan: Plan, graph: OpGraph, costs: Costs, position: int, held: Sequence[Tensor]
) -> Mapping[str, Unit]:
    """Return the units of the parameters `held` by a rank at `position`, by module path.

    What belongs to no unit is in "", as what no unit names is whole on every rank.
    """
    how = way(plan)
    paths = plan.placed(how) if how else ()
    groups = chain.parameters(graph, paths or ("",))
    mine = {tensor.name for tensor in held}
    taken = {tensor.name for tensors in groups.values() for tensor in tensors}
    left = [tensor for tensor in held if tensor.name not in taken]
    groups[""] = (*groups.get("", ()), *left)
    make = _Maker(plan, graph, costs, position)
    found = {
        name: make.unit(name, [tensor for tensor in tensors if tensor.name in mine], how)
        for name, tensors in groups.items()
    }
    if plan.offload != "optimizer":
        return found
    # What several axes or microbatches reduce is whole only after the last backward.
    lands = not (len(plan.stages) > 1 or plan.placed("sequence")) and (
        how in ("replicate", "shard") or (how == "shard_optimizer" and plan.size("replica") == 1)
    )
    return {
        name: replace(updated_on_host(unit, costs, position), lands=lands)
        for name, unit in found.items()
    }


def updated_on_host(unit: Unit, costs: Costs, position: int) -> Unit:
    """Return the unit with its update on the host of the devices at `position`."""
    size = unit.updated_bytes
    if not size:
        return unit
    return replace(
        unit,
        host_bytes=size,
        down=(costs.copy("down", size, position),),
        up=(costs.copy("up", size, position),),
    )


class _Maker:
    def __init__(self, plan: Plan, graph: OpGraph, costs: Costs, position: int) -> None:
        self.graph = graph
        self.costs = costs
        self.position = position
        # On a CPU the host is where everything is already.
        self.from_host = plan.offload == "parameters" and not costs.is_cpu
        self.num = plan.size("data")
        self.data = costs.group(("data",), position)
        self.replicas = costs.group(("replica",), position)
        self.everyone = costs.group(("replica", "data"), position)

    def unit(self, name: str, tensors: Sequence[Tensor], how: How | None) -> Unit:
        trained = [tensor for tensor in tensors if tensor.requires_grad]
        if how == "shard":
            return self._sharded(name, tensors)
        whole = sum(tensor.num_bytes for tensor in tensors)
        gradients = sum(tensor.num_bytes for tensor in trained)
        if how is None or len(self.everyone) == 1:
            return Unit(name, tuple(tensors), whole, gradients, gradients, gradients)
        buckets = _by_dtype(trained)
        if how == "replicate":
            return Unit(
                name, tuple(tensors), whole, gradients, gradients, gradients,
                reduce=tuple(
                    self.costs.meet("all_reduce", size, self.everyone) for size in buckets.values()
                ),
                reserved_bytes=gradients,
            )  # fmt: skip
        padded = [padded_elements(size, dtype, self.num) for dtype, size in buckets.items()]
        share = sum(padded) // self.num
        call = self.costs.call if how == "shard_gradients" else self.costs.meet
        return Unit(
            name, tuple(tensors), whole, gradients, share, share,
            reduce=self._scatter(padded, call),
            each_microbatch=how == "shard_gradients",
            after_update=tuple(call("all_gather", size, self.data) for size in padded),
            reserved_bytes=share if how == "shard_gradients" else share + sum(padded),
            buffer_bytes=sum(padded) if how == "shard_gradients" else 0,
        )  # fmt: skip

    def _sharded(self, name: str, tensors: Sequence[Tensor]) -> Unit:
        padded = {tensor.name: padded_rows(tensor, self.num) for tensor in tensors}
        reached = [
            padded[tensor.name]
            for tensor in tensors
            if tensor.requires_grad
            and any(
                op.name in self.graph.differentiated for op in self.graph.consumers[tensor.name]
            )
        ]
        whole, gradients = sum(padded.values()), sum(reached)
        gather = self._slower(
            (self.costs.call("all_gather", whole, self.data),) if whole else (), GATHER
        )
        reduce = self._slower(
            self._scatter([gradients] if gradients else [], self.costs.call), REDUCE
        )
        unit = Unit(
            name, tuple(tensors),
            held_bytes=whole // self.num,
            gradient_bytes=gradients,
            shard_bytes=gradients // self.num,
            updated_bytes=gradients // self.num,
            whole_bytes=whole,
            gather=gather,
            reduce=reduce,
        )  # fmt: skip
        if not self.from_host:
            return unit
        share, down = unit.held_bytes, unit.shard_bytes
        return replace(
            unit,
            held_bytes=0,
            shard_bytes=0,
            whole_bytes=whole + share,  # what came up is there until it is gathered
            host_bytes=share,
            gather=(self.costs.copy("up", share, self.position), *gather) if whole else (),
            reduce=(*reduce, self.costs.copy("down", down, self.position)) if gradients else (),
        )

    def _slower(self, calls: tuple[Call, ...], name: str) -> tuple[Call, ...]:
        """The calls with what FSDP2 adds to the first: it copies in and out."""
        return (*(self.costs.slower(call, name) for call in calls[:1]), *calls[1:])

    def _scatter(
        self, sizes: Iterable[int], call: Callable[[str, int, tuple[int, ...]], Call]
    ) -> tuple[Call, ...]:
        calls = []
        for size in sizes:
            calls.append(call("reduce_scatter", size, self.data))
            if len(self.replicas) > 1:
                calls.append(self.costs.call("all_reduce", size // self.num, self.replicas))
        return tuple(calls)


def _by_dtype(tensors: Iterable[Tensor]) -> dict[str, int]:
    found: dict[str, int] = {}
    for tensor in tensors:
        found[tensor.dtype] = found.get(tensor.dtype, 0) + tensor.num_bytes
    return found


def padded_elements(num_bytes: int, dtype: str, num_ranks: int) -> int:
    """Bytes of a flat buffer whose elements are padded to a multiple of `num_ranks`.

    >>> padded_elements(20, "float32", 2)
    24
    """
    step = item_bytes(dtype) * num_ranks
    return -(-num_bytes // step) * step


def padded_rows(tensor: Tensor, num_ranks: int) -> int:
    """Bytes of a parameter whose dim 0 is padded to a multiple of `num_ranks`."""
    if not tensor.shape:
        return tensor.num_bytes * num_ranks
    rows = -(-tensor.shape[0] // num_ranks) * num_ranks
    return tensor.num_bytes // max(tensor.shape[0], 1) * rows
