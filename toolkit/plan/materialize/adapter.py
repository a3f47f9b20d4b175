"""Adapter: the steps between a tensor's producers and its consumers. Data only.

Every step reads and writes named buffers, each a part of the tensor on one rank, written once, so
a step says all that is needed to run it. Ranks need not wait for each other within a phase, beyond
what they send; the local steps of one rank run in order.

| kind                                             | reads                | writes              |
|--------------------------------------------------|----------------------|---------------------|
| all_gather all_reduce reduce_scatter all_to_all  | one of each rank     | one of each rank    |
| broadcast                                        | one of the first rank| one of each other   |
| send                                             | one of the first rank| one of the second   |
| slice pad sum concat assemble zero copy, local   | any number           | one                 |

A local step writes zeros, and adds each buffer read where its box lies.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from toolkit import units
from toolkit.plan.tensors import Mask, PTensor

Kind = Literal[
    "all_gather", "all_reduce", "reduce_scatter", "all_to_all", "broadcast", "send",
    "slice", "pad", "sum", "concat", "assemble", "zero", "copy",
]  # fmt: skip
COLLECTIVES: frozenset[str] = frozenset(
    {"all_gather", "all_reduce", "reduce_scatter", "all_to_all", "broadcast"}
)
COMMUNICATES: frozenset[str] = COLLECTIVES | {"send"}


@dataclass(frozen=True)
class Buffer:
    """A part of the tensor in the memory of one rank."""

    name: str
    rank: int
    mask: Mask


@dataclass(frozen=True)
class Step:
    """One primitive. `ranks` are in the order of their pieces; `num_bytes` is the size of the full
    tensor of a collective (see cost.collective) or of a message, `seconds` is predicted.
    """

    phase: int
    kind: Kind
    ranks: tuple[int, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    dim: int | None = None
    to_dim: int | None = None
    num_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Adapter:
    """How a tensor gets from producers to consumers. All times are predicted.

    `inputs` names the buffer of each producer, `outputs` that of each consumer, in the order given.
    `phase_s` is how long each phase takes with all its steps at once. `route` says in words which
    way was chosen, and `others` what each way not chosen would have taken.
    """

    tensor: PTensor
    route: str
    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    phase_s: tuple[float, ...]
    others: Mapping[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Predicted time of the whole adapter, run alone."""
        return sum(self.phase_s)

    @cached_property
    def buffer(self) -> Mapping[str, Buffer]:
        """Buffers by name."""
        return {buffer.name: buffer for buffer in self.buffers}

    @property
    def communication(self) -> tuple[Step, ...]:
        """The steps that send anything."""
        return tuple(step for step in self.steps if step.kind in COMMUNICATES)

    def of_rank(self, rank: int) -> tuple[Step, ...]:
        """Return the steps one rank takes part in, in order."""
        return tuple(step for step in self.steps if rank in step.ranks)

    def to_body(self) -> dict[str, Any]:
        """Return the adapter as a JSON value."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_body(body: Any) -> Adapter:
        """Build an adapter from the JSON value of `to_body`."""
        from pydantic import TypeAdapter

        return TypeAdapter(Adapter).validate_python(body)

    def __str__(self) -> str:
        """One line a phase and kind: how many run at once, on what, for how long."""
        shape = "x".join(map(str, self.tensor.shape)) or "scalar"
        lines = [
            f"{self.tensor.name} {shape} {self.tensor.dtype}: {self.route}; "
            f"{units.format_seconds(self.seconds)} predicted"
        ]
        for phase, seconds in enumerate(self.phase_s):
            steps = [step for step in self.steps if step.phase == phase]
            for kind, count in Counter(step.kind for step in steps).items():
                like = [step for step in steps if step.kind == kind]
                lines.append(f"  {phase}. {_described(kind, count, like, seconds)}")
        return "\n".join(lines)


def _described(kind: str, count: int, steps: list[Step], seconds: float) -> str:
    first = steps[0]
    many = f"{count} x {kind}" if count > 1 else kind
    where = "".join(f" dim {dim}" for dim in (first.dim,) if dim is not None)
    where += f" -> dim {first.to_dim}" if first.to_dim is not None else ""
    groups = ", ".join(str(list(step.ranks)) for step in steps[:4]) + (", ..." * (count > 4))
    if kind not in COMMUNICATES:
        return f"{many}{where} on ranks {sorted({step.ranks[0] for step in steps})}"
    size = units.format_bytes(max(step.num_bytes for step in steps))
    return f"{many}{where} over {groups}: {size}, {units.format_seconds(seconds)}"


class Builder:
    """Collects buffers and steps, phase by phase."""

    def __init__(self, tensor: PTensor) -> None:
        self.tensor = tensor
        self.buffers: list[Buffer] = []
        self.steps: list[Step] = []
        self.phase_s: list[float] = []

    def buffer(self, rank: int, mask: Mask, name: str = "") -> Buffer:
        """Add a buffer; unnamed ones are numbered."""
        made = Buffer(name or f"b{len(self.buffers)}", rank, mask)
        self.buffers.append(made)
        return made

    @property
    def phase(self) -> int:
        """The phase that steps are added to now."""
        return len(self.phase_s)

    def end_phase(self, seconds: float = 0.0) -> None:
        """Close the phase, if anything happened in it."""
        if any(step.phase == self.phase for step in self.steps):
            self.phase_s.append(seconds)

    def step(
        self,
        kind: Kind,
        ranks: tuple[int, ...],
        reads: tuple[Buffer, ...],
        writes: tuple[Buffer, ...],
        *,
        dim: int | None = None,
        to_dim: int | None = None,
        num_bytes: int = 0,
        seconds: float = 0.0,
    ) -> None:
        """Add a step to the phase."""
        self.steps.append(
            Step(
                self.phase,
                kind,
                ranks,
                tuple(buffer.name for buffer in reads),
                tuple(buffer.name for buffer in writes),
                dim,
                to_dim,
                num_bytes,
                seconds,
            )
        )

    def local(self, rank: int, mask: Mask, reads: tuple[Buffer, ...]) -> Buffer:
        """Put buffers of one rank together to a new one; return the only one if it is that."""
        if len(reads) == 1 and reads[0].mask.box == mask.box:
            return reads[0]
        made = self.buffer(rank, mask)
        self.step(_local_kind(mask, reads), (rank,), reads, (made,))
        return made

    def done(self, route: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Adapter:
        """Return the adapter; every phase has to be closed."""
        assert all(step.phase < self.phase for step in self.steps)
        return Adapter(
            self.tensor,
            route,
            tuple(self.buffers),
            tuple(self.steps),
            inputs,
            outputs,
            tuple(self.phase_s),
        )


def _local_kind(mask: Mask, reads: tuple[Buffer, ...]) -> Kind:
    if not reads:
        return "zero"
    if len(reads) == 1:
        return "slice" if reads[0].mask.numel > mask.numel else "pad"
    if all(buffer.mask.box == mask.box for buffer in reads):
        return "sum"
    one_family = len({buffer.mask.chunk for buffer in reads}) == 1
    if one_family and sum(buffer.mask.numel for buffer in reads) == mask.numel:
        return "concat"
    return "assemble"
