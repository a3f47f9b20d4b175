"""What one step computes, and what comes back: all that scheduler and executor exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.serve.request import Phase, Request


@dataclass(frozen=True, slots=True)
class Slice:
    """The tokens at positions [start, end) of one request, computed in one step."""

    request: Request
    phase: Phase
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def samples(self) -> bool:
        """Whether the step ends at the request's last known token, so that the next is drawn."""
        return self.end == self.request.num_tokens

    @property
    def token_ids(self) -> Sequence[int]:
        return self.request.tokens(self.start, self.end)


@dataclass(frozen=True, slots=True)
class Batch:
    """The slices of one step. A request appears at most once and stays put while in flight."""

    step: int
    slices: tuple[Slice, ...]

    def __bool__(self) -> bool:
        return bool(self.slices)

    @property
    def num_tokens(self) -> int:
        return sum(piece.num_tokens for piece in self.slices)

    def of(self, phase: Phase) -> tuple[Slice, ...]:
        """Return the slices of one phase, in scheduled order."""
        return tuple(piece for piece in self.slices if piece.phase is phase)


@dataclass(frozen=True, slots=True)
class StepResult:
    """One entry per slice: the token drawn, or None where the slice does not sample."""

    token_ids: tuple[int | None, ...]
