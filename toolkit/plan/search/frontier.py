"""Candidates, and the frontier of those that nothing beats in both time and memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from toolkit.plan.plan import Alternative, How, Offload
from toolkit.plan.search.estimate import Estimate, Stretch
from toolkit.plan.search.site import Mesh
from toolkit.plan.search.stack import Layouts, Stack
from toolkit.units import format_bytes, format_seconds

_WAYS = {
    "replicate": "replicated",
    "shard_optimizer": "ZeRO-1",
    "shard_gradients": "ZeRO-2",
    "shard": "ZeRO-3",
}


def cut(microbatches: int, num_samples: int) -> str:
    """How a batch is cut, in words.

    >>> cut(8, 4), cut(1, 4)
    ('8 microbatches of 4', '1 microbatch of 4')
    """
    return f"{microbatches} microbatch{'es' * (microbatches > 1)} of {num_samples}"


@dataclass(frozen=True)
class Candidate:
    """One whole choice, estimated. `split` says how operators are split over the inner axes."""

    mesh: Mesh
    num_samples: int
    microbatches: int
    schedule: str
    parameters: How
    split: str
    recomputed: int
    stretches: tuple[Stretch, ...] = field(repr=False)
    positions: tuple[int, ...] = field(repr=False)
    estimate: Estimate = field(repr=False)
    stack: Stack = field(repr=False, compare=False)
    layouts: Layouts = field(repr=False, compare=False)
    offload: Offload = "none"

    @property
    def step_s(self) -> float:
        return self.estimate.step_s

    @property
    def peak_bytes(self) -> int:
        return self.estimate.peak_bytes

    @property
    def description(self) -> str:
        """What it is, in one line."""
        parts = [str(self.mesh), cut(self.microbatches, self.num_samples)]
        if self.mesh.pipeline > 1:
            parts.append(self.schedule)
        if self.mesh.data > 1:
            parts.append(_WAYS[self.parameters])
        if self.mesh.inner > 1:
            parts.append(self.split)
        if self.recomputed:
            parts.append(f"{self.recomputed} blocks recomputed")
        if self.offload != "none":
            parts.append(f"{self.offload} on the host")
        return ", ".join(parts)

    def alternative(self, reason: str = "") -> Alternative:
        """Return what a plan remembers of it."""
        return Alternative(self.description, self.step_s, self.peak_bytes, reason)

    def __str__(self) -> str:
        return f"{format_seconds(self.step_s)}, {format_bytes(self.peak_bytes)}: {self.description}"


@dataclass(frozen=True)
class Unfit:
    """A candidate that needs more memory than there is, with what it would take."""

    candidate: Candidate
    limit_bytes: float

    @property
    def over_bytes(self) -> float:
        return self.candidate.peak_bytes - self.limit_bytes


@dataclass
class Frontier:
    """Keeps what no other candidate beats, and the fastest few."""

    num_fastest: int = 16
    members: list[Candidate] = field(default_factory=list)
    fastest: list[Candidate] = field(default_factory=list)

    def add(self, candidate: Candidate) -> bool:
        """Keep a candidate if it is worth it; return whether it is the fastest so far."""
        first = not self.fastest or candidate.step_s < self.fastest[0].step_s
        self.fastest.append(candidate)
        self.fastest.sort(key=lambda one: one.step_s)
        del self.fastest[self.num_fastest :]
        if not self.beaten(candidate.step_s, candidate.peak_bytes):
            self.members = [
                one
                for one in self.members
                if one.step_s < candidate.step_s or one.peak_bytes < candidate.peak_bytes
            ]
            self.members.append(candidate)
            self.members.sort(key=lambda one: one.step_s)
        return first

    def beaten(self, step_s: float, peak_bytes: float) -> bool:
        """Return whether something is as fast and as small."""
        return any(one.step_s <= step_s and one.peak_bytes <= peak_bytes for one in self.members)

    @property
    def best(self) -> Candidate | None:
        return self.fastest[0] if self.fastest else None
