"""One request of a load, as whoever sent it saw it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from toolkit.serve.bench.load import Arrival


@dataclass(frozen=True)
class Sample:
    """One request as its client saw it, in seconds; `error` None means that it was served."""

    arrival: Arrival
    sent_s: float
    end_s: float
    piece_s: tuple[float, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.piece_s[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Times between pieces of text."""
        return [b - a for a, b in itertools.pairwise(self.piece_s)]

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first, on average; None of a single token."""
        if self.output_tokens < 2:
            return None
        return (self.piece_s[-1] - self.piece_s[0]) / (self.output_tokens - 1)
