"""Plan: how one training step of a model is divided over devices. Data only; no torch here.

A plan answers the paper's three questions by module path: how each part is *transformed*
(`placements` of modules, `splits` of operators), where it runs (`mesh`, `stages`) and in which
*order* (`order`). How the pieces exchange data follows from those and is not written down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from toolkit.plan.order.action import Rows
from toolkit.plan.order.pipeline import Order

AxisName = Literal["pipeline", "replica", "data", "context", "tensor"]
How = Literal[
    # How a module's parameters lie over the data axis:
    "replicate",  # whole on every rank; gradients are all-reduced (data parallel)
    "shard_optimizer",  # whole, but each rank updates 1/n of them (ZeRO-1)
    "shard_gradients",  # as before, and each rank keeps 1/n of the gradients (ZeRO-2)
    "shard",  # each rank keeps 1/n of everything and gathers a unit to compute (FSDP2, ZeRO-3)
    # How a module is split over the tensor axis:
    "column",  # a Linear's output features
    "row",  # a Linear's input features; its output is a partial sum
    # Tokens of the activations between split Linears (Megatron's sequence parallel). On a module
    # inside another so placed: computed whole, gathered in and cut out.
    "sequence",
]
DATA_WAYS: tuple[How, ...] = ("replicate", "shard_optimizer", "shard_gradients", "shard")
# Those of them that torch's pipeline runtime is given.
PIPELINED_WAYS: tuple[How, ...] = ("replicate", "shard_optimizer")
# What lives in the memory of the host instead of the device's:
Offload = Literal[
    "none",
    "optimizer",  # the moments and the update: gradients go down, new parameters come up
    "parameters",  # also the shards: a unit comes up to be gathered, its gradients go down
]
OFFLOADS: tuple[Offload, ...] = ("none", "optimizer", "parameters")

# Unknown keys in a file are errors (read by pydantic in io.py).
_STRICT = {"extra": "forbid"}


@dataclass(frozen=True)
class Axis:
    """One axis of the device mesh. Ranks are numbered row-major: the last axis varies fastest.

    Every rank along `replica` and `data` runs the same program on its part of the batch; what is
    sharded is sharded over `data` and replicated over `replica` (hybrid sharding).
    """

    __pydantic_config__ = _STRICT
    name: AxisName
    size: int


@dataclass(frozen=True)
class Placement:
    """How the module at path `module` lies over the mesh axis `axis`. "" is the whole model.

    The ways of the data axis mark a unit: the module's parameters, less those of units inside it,
    are reduced (or gathered) together.
    """

    __pydantic_config__ = _STRICT
    module: str
    axis: AxisName
    how: How


@dataclass(frozen=True)
class Split:
    """op-trans by path: every operator `ops` matches is split along `dim` of its annotation.

    Patterns are those of `program.select` (`"blocks.*.ffn.up"`). Over a mesh axis each rank runs
    one part. With `axis` None the parts are co-shards: `parts` of them on the same device, one
    after another, recomputed in backward. Operators that no split names are replicated.
    """

    __pydantic_config__ = _STRICT
    ops: str
    dim: str
    axis: AxisName | None
    parts: int = 0


@dataclass(frozen=True)
class Stage:
    """A stretch of the model that runs in one place: from the first operator of the module
    `begins_at` (None: from the model's start) to the next stage's beginning.

    `devices` are positions along the pipeline axis: several where all of them hold the stage and
    its operators are split over them. A `no_grad` stage has forwards only.
    """

    __pydantic_config__ = _STRICT
    begins_at: str | None
    blocks: tuple[str, ...]
    devices: tuple[int, ...] = (0,)
    no_grad: bool = False


@dataclass(frozen=True)
class Provenance:
    """What was planned: the model, the sizes of one global batch (`batch`, `tokens`, ...), the
    digest of its graph at those sizes, and the cluster.
    """

    __pydantic_config__ = _STRICT
    model: str
    sizes: Mapping[str, int]
    dtype: str
    graph_digest: str
    cluster: str


@dataclass(frozen=True)
class Traffic:
    """What a rank at `position` of the pipeline axis communicates in one step.

    `num_bytes` is summed over the calls; a collective counts its full (unsharded) tensor, a send
    or receive its message.
    """

    __pydantic_config__ = _STRICT
    position: int
    kind: str
    count: int
    num_bytes: int


@dataclass(frozen=True)
class Prediction:
    """What the cost model and the simulation say of one step. Nothing here was measured.

    `mfu` is model FLOPs / (step time x devices x peak); `bubble` the share of the schedule in
    which the average device computes nothing; `memory_bytes` holds, for a rank at each position of
    the pipeline axis, bytes by category at the peak. `host_bytes` is what it keeps beside that on
    the host, of which its device's part is `host_limit_bytes`; empty where nothing is offloaded or
    the device is the host.
    """

    __pydantic_config__ = _STRICT
    step_s: float
    model_flops: float
    mfu: float
    bubble: float
    memory_bytes: tuple[Mapping[str, int], ...]
    memory_limit_bytes: int
    traffic: tuple[Traffic, ...]
    host_bytes: tuple[int, ...] = ()
    host_limit_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """The fullest rank's memory."""
        return max(sum(entries.values()) for entries in self.memory_bytes)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.memory_limit_bytes and (
            self.host_peak_bytes <= self.host_limit_bytes
        )

    @property
    def host_peak_bytes(self) -> int:
        """What the fullest rank keeps on the host."""
        return max(self.host_bytes, default=0)


@dataclass(frozen=True)
class Alternative:
    """A plan that was considered and not taken: its predicted step and fullest rank, and why not.

    `reason` is empty for one that fits and is only slower; `step_s` and `peak_bytes` are None where
    the plan could not be made at all.
    """

    __pydantic_config__ = _STRICT
    description: str
    step_s: float | None
    peak_bytes: int | None
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """A whole plan.

    `order` holds a row of actions for each position of the pipeline axis, in the order they are
    run; `schedule` names the family it is of (order/families.py), or is "custom". Modules in
    `recompute` keep only their inputs in forward, and run again in backward. `offload` says what
    lives on the host. `considered` is what else was weighed when it was made.
    """

    __pydantic_config__ = _STRICT
    strategy: str
    provenance: Provenance
    mesh: tuple[Axis, ...]
    placements: tuple[Placement, ...]
    stages: tuple[Stage, ...]
    microbatches: int
    schedule: str
    order: Rows
    splits: tuple[Split, ...] = ()
    recompute: tuple[str, ...] = ()
    offload: Offload = "none"
    seed: int = 0
    prediction: Prediction | None = None
    considered: tuple[Alternative, ...] = ()

    @property
    def num_ranks(self) -> int:
        return math.prod(axis.size for axis in self.mesh)

    def size(self, axis: AxisName) -> int:
        """Return how many ranks lie along `axis`; 1 when the mesh has no such axis."""
        return next((found.size for found in self.mesh if found.name == axis), 1)

    def stride(self, axis: AxisName) -> int:
        """Return how far apart neighbours along `axis` are in the numbering of ranks."""
        names = [found.name for found in self.mesh]
        inner = self.mesh[names.index(axis) + 1 :] if axis in names else ()
        return math.prod(found.size for found in inner)

    def along(self, axis: AxisName, rank: int = 0) -> tuple[int, ...]:
        """Return the ranks that differ from `rank` along `axis` alone, itself included.

        A pipeline's stage s is at position s of the ranks along it.
        """
        size, stride = self.size(axis), self.stride(axis)
        first = rank - rank // stride % size * stride
        return tuple(first + place * stride for place in range(size))

    def placed(self, how: How) -> tuple[str, ...]:
        """Return the paths of the modules placed `how`, in model order."""
        return tuple(entry.module for entry in self.placements if entry.how == how)

    @property
    def table(self) -> Order:
        """The order with where its stages run, as `order/` takes it."""
        return Order(
            name=self.schedule,
            placement=tuple(stage.devices for stage in self.stages),
            num_microbatches=self.microbatches,
            rows=self.order,
            no_grad=frozenset(i for i, stage in enumerate(self.stages) if stage.no_grad),
        )

    def held_stages(self, position: int) -> tuple[int, ...]:
        """Return the stages at a position of the pipeline axis."""
        return tuple(i for i, stage in enumerate(self.stages) if position in stage.devices)

    @property
    def num_replicas(self) -> int:
        """Into how many parts the batch is divided: ranks along `replica` times `data`."""
        return self.size("replica") * self.size("data")

    @property
    def rank_batch(self) -> int:
        """Samples of the global batch one rank sees in a step."""
        return self.provenance.sizes["batch"] // self.num_replicas

    @property
    def microbatch(self) -> int:
        """Samples in one microbatch of one rank."""
        return self.rank_batch // self.microbatches
