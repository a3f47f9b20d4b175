"""What one step computes, and what comes back: all that scheduler and executor exchange."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from toolkit.serve.request import FinishReason, Phase, Request


class Slice(NamedTuple):
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
    def num_logits(self) -> int:
        """Of how many of its last tokens the logits are wanted: all where a prompt is scored."""
        if self.request.sampling.prompt_logprobs is not None and self.phase is Phase.PREFILL:
            return self.num_tokens
        return int(self.samples)

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
class Score:
    """How likely the model held a token: its log-probability, and the likeliest in its place.

    `rank` is 1 for the likeliest; `top` holds (token id, log-probability), likeliest first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Detail:
    """What a slice's request asked for besides its token.

    `score` is the drawn token's; `prompt` scores the prompt's tokens at positions
    [start + 1, end + 1) of the slice, as far as the prompt goes; `hidden_sum` adds up its tokens'
    last hidden states.
    """

    score: Score | None = None
    prompt: tuple[Score, ...] = ()
    hidden_sum: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """One entry per slice: the token drawn, or None where the slice does not sample.

    `details` holds, by request id, what few requests ask for.
    """

    token_ids: tuple[int | None, ...]
    details: Mapping[str, Detail] = field(default_factory=dict)


class Token(NamedTuple):
    """A token drawn for a request, and whether the request ended with it.

    `index` counts the request's outputs from 0; `gap_s` is the time since the one before, for the
    first since arrival.
    """

    request: Request
    token_id: int
    index: int  # type: ignore[assignment]  # a tuple's `index` is of no use here
    gap_s: float
    finish_reason: FinishReason | None
