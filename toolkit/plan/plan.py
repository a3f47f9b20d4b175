"""Plan: how one training step of a model is divided over devices. Data only; no torch here.

A plan answers the paper's three questions by module path: how each module is *transformed*
(`placements`), where each part runs (`mesh`, `stages`) and in which *order* (`order`). How the
pieces exchange data follows from those and is not written down.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

AxisName = Literal["data", "tensor", "pipeline"]
How = Literal[
    "replicate",  # every rank holds the whole parameter; gradients are averaged (data parallel)
    "shard",  # each rank keeps 1/n of every parameter and gathers it to compute (FSDP2, ZeRO-3)
    "column",  # a Linear's output features are split
    "row",  # a Linear's input features are split; its output is a partial sum
]
ActionKind = Literal["F", "B"]

# Unknown keys in a file are errors (read by pydantic in io.py).
_STRICT = {"extra": "forbid"}


@dataclass(frozen=True)
class Axis:
    """One axis of the device mesh. Ranks are numbered row-major: the last axis varies fastest."""

    __pydantic_config__ = _STRICT
    name: AxisName
    size: int


@dataclass(frozen=True)
class Placement:
    """How the module at path `module` lies over the mesh axis `axis`. "" is the whole model.

    `replicate` and `shard` mark a unit: the module's parameters, less those of units inside it,
    are reduced (or gathered) together.
    """

    __pydantic_config__ = _STRICT
    module: str
    axis: AxisName
    how: How


@dataclass(frozen=True)
class Stage:
    """A stretch of the model that runs in one place: from the first operator of the module
    `begins_at` (None: from the model's start) to the next stage's beginning.
    """

    __pydantic_config__ = _STRICT
    begins_at: str | None
    blocks: tuple[str, ...]


@dataclass(frozen=True, order=True)
class Action:
    """One step of a schedule: forward (F) or backward (B) of a microbatch through a stage.

    >>> str(Action(1, "F", 3)), Action.parse("0B12")
    ('1F3', Action(stage=0, kind='B', microbatch=12))
    """

    stage: int
    kind: ActionKind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @staticmethod
    def parse(text: str) -> Action:
        """Read the form `<stage><F|B><microbatch>`. Raises ValueError when it is none."""
        found = re.fullmatch(r"(\d+)([FB])(\d+)", text)
        if found is None:
            raise ValueError(f"{text!r} is not <stage><F|B><microbatch>, such as 0F3")
        return Action(int(found[1]), "F" if found[2] == "F" else "B", int(found[3]))


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
    """What one rank of a stage communicates in one step.

    `num_bytes` is summed over the calls; a collective counts its full (unsharded) tensor, a send
    or receive its message.
    """

    __pydantic_config__ = _STRICT
    stage: int
    kind: str
    count: int
    num_bytes: int


@dataclass(frozen=True)
class Prediction:
    """What the cost model and the simulation say of one step. Nothing here was measured.

    `mfu` is model FLOPs / (step time x devices x peak); `bubble` the share of the schedule in
    which the average device computes nothing; `memory_bytes` holds, for each stage's rank, bytes
    by category at the peak.
    """

    __pydantic_config__ = _STRICT
    step_s: float
    model_flops: float
    mfu: float
    bubble: float
    memory_bytes: tuple[Mapping[str, int], ...]
    memory_limit_bytes: int
    traffic: tuple[Traffic, ...]

    @property
    def peak_bytes(self) -> int:
        """The fullest rank's memory."""
        return max(sum(entries.values()) for entries in self.memory_bytes)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.memory_limit_bytes


@dataclass(frozen=True)
class Plan:
    """A whole plan. `order` holds one row of actions per stage, in the order they are run."""

    __pydantic_config__ = _STRICT
    strategy: str
    provenance: Provenance
    mesh: tuple[Axis, ...]
    placements: tuple[Placement, ...]
    stages: tuple[Stage, ...]
    microbatches: int
    order: tuple[tuple[Action, ...], ...]
    recompute: bool = False
    seed: int = 0
    prediction: Prediction | None = None

    @property
    def num_ranks(self) -> int:
        return math.prod(axis.size for axis in self.mesh)

    def size(self, axis: AxisName) -> int:
        """Return how many ranks lie along `axis`; 1 when the mesh has no such axis."""
        return next((found.size for found in self.mesh if found.name == axis), 1)

    def placed(self, how: How) -> tuple[str, ...]:
        """Return the paths of the modules placed `how`, in model order."""
        return tuple(entry.module for entry in self.placements if entry.how == how)

    @property
    def rank_batch(self) -> int:
        """Samples of the global batch one rank sees in a step."""
        return self.provenance.sizes["batch"] // self.size("data")

    @property
    def microbatch(self) -> int:
        """Samples in one microbatch of one rank."""
        return self.rank_batch // self.microbatches
