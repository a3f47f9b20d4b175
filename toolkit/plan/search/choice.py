"""What is chosen for a segment of the chain, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from toolkit.ir.graph import Tensor
from toolkit.plan.search.layouts import Layout

Dims = tuple[str | None, ...]  # the identifier that each axis splits of an operator


@dataclass(frozen=True)
class End:
    """One end of a link: the layout of the tensor there, and of its gradient."""

    tensor: Layout
    gradient: Layout


class Side:
    """The ends that the options of a node have of one tensor: the distinct layouts among them, and
    which of those each option has.
    """

    def __init__(self, ends: Sequence[End]) -> None:
        self.ends = tuple(ends)
        self.tensors, self.tensor_at = _distinct([end.tensor for end in ends])
        self.gradients, self.gradient_at = _distinct([end.gradient for end in ends])


def _distinct(layouts: Sequence[Layout]) -> tuple[tuple[Layout, ...], Any]:
    place = {layout: at for at, layout in enumerate(dict.fromkeys(layouts))}
    return tuple(place), np.array([place[layout] for layout in layouts])


class Option(NamedTuple):
    """What one way to run an operator takes: seconds, `sync_s` once a step, and bytes."""

    forward_s: float
    backward_s: float
    sync_s: float
    saved: int
    held: int


@dataclass(frozen=True)
class Weights:
    """How inner costs are added up: what counts is time per microbatch, and bytes at the peak."""

    microbatches: int = 1
    recompute: bool = False
    held: float = 4.0  # bytes at the peak for each byte of weights: gradient and moments too
    alive: float = 1.0  # microbatches whose activations are alive

    def memory(self, option: Option) -> float:
        """Return the bytes at the peak of one way to run an operator."""
        return self.held * option.held + (0 if self.recompute else self.alive * option.saved)

    @staticmethod
    def near(microbatches: int) -> Weights:
        """Return those of 1 or 8 microbatches: what comes once a step weighs as little."""
        return Weights(1 if microbatches < 4 else 8)


@dataclass(frozen=True)
class Cost:
    """What a segment takes on one rank, for one microbatch unless said otherwise.

    `again_s` is what recomputing it adds to the backward, `earlier_s` the part of forward in passes
    before the last, `weight_s` the part of the backward that makes gradients of weights, `sync_s`
    (a step) what reducing gradients of weights over the axes takes. Bytes are local:
    `entering_bytes` are what recomputation keeps, `temporary_bytes` what the fullest operator takes
    beyond what is saved, `owed_bytes` what the input's half of backward leaves to the other.
    """

    forward_s: float
    backward_s: float
    weight_s: float
    again_s: float
    sync_s: float
    saved_bytes: int
    entering_bytes: int
    temporary_bytes: int
    owed_bytes: int
    parameters: Mapping[str, Tensor]  # as they are on this rank
    earlier_s: float = 0.0


@dataclass
class Chosen:
    """A solved segment: the identifiers its operators split, and the ends it shows to others."""

    dims: Mapping[str, Dims]  # operator -> identifier per axis
    makes: Mapping[str, End]  # tensors made here
    takes: Mapping[str, End]  # tensors from outside
    made: Mapping[str, End] = field(default_factory=dict)  # by segments solved before
    taken: Mapping[str, Sequence[End]] = field(default_factory=dict)
    memory: float = 0.0
    gap: float = 0.0  # how far from the best it may be, relative
    method: str = ""
    passing: tuple[int, int] | None = None
