"""Undivided or divided: what either loses of the time of those who wait for tokens.

The formulas are at the head of `controller.py`; here they are worked out for one situation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from toolkit.serve.split.work import Load
from toolkit.units import format_seconds

# Tokens of prompts that an undivided step may be held to.
# Each is at most a quarter more than the one before, so that little of the time goes unused.
CHUNKS = (
    *(8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256),
    *(320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792),
)


@dataclass(frozen=True, slots=True)
class Situation:
    """What the controller sees: what either phase computes now or next, and who waits for it.

    `waiting` prompts are queued or being computed, `decoding` requests have tokens to come;
    `kv_usage` is the part of the KV cache in use, 0 to 1.
    """

    prefill: Load
    decode: Load
    waiting: int
    decoding: int
    kv_usage: float


class Seconds(NamedTuple):
    """Predicted seconds of a chunk and of a token, each phase on its part of the units."""

    prefill_s: float
    decode_s: float


@dataclass(frozen=True)
class Weighing:
    """One situation and its choices: cuts, and undivided steps of `chunk` tokens of prompts.

    `chunk` None is all there are; such a step takes `mixed_s`, one of decoding alone `alone_s`, and
    a token may take `allowed_s`, if that was promised. `divided` gives the seconds at a cut.
    """

    situation: Situation
    chunk: int | None
    mixed_s: float
    alone_s: float
    allowed_s: float | None
    divided: Callable[[int], Seconds]

    @property
    def together_s(self) -> float:
        """Request-seconds lost undivided until the present chunk of prompts is computed."""
        waiting, decoding = self.situation.waiting, self.situation.decoding
        num = 1.0 if self.chunk is None else self.situation.prefill.tokens / self.chunk
        return num * (waiting * self.mixed_s + decoding * max(0.0, self.mixed_s - self.alone_s))

    def apart_s(self, cut: int) -> float:
        """Request-seconds lost at a cut until then."""
        prefill_s, decode_s = self.divided(cut)
        waiting, decoding = self.situation.waiting, self.situation.decoding
        return prefill_s * (waiting + decoding * max(0.0, 1.0 - self.alone_s / decode_s))

    def choose(self, cuts: Sequence[int], present: int | None, margin: float) -> int | None:
        """Return the cut that loses least, or None for undivided.

        `present` (likewise) stays unless another saves `margin` of what it loses. What breaks the
        promise is chosen only where all do; then a token's seconds count instead.
        """
        choices = [None, *cuts]
        known = [*choices, *(one for one in (present,) if one not in choices)]
        kept = [one for one in known if not self._breaks(self._token_s(one))]
        price = self._token_s if not kept else self._lost_s
        best = min((one for one in choices if not kept or one in kept), key=price, default=present)
        if (present in kept or not kept) and price(best) >= price(present) * (1.0 - margin):
            return present
        return best

    def said(self, cut: int) -> str:
        """Say what was weighed, for people."""
        held = "" if self.chunk is None else f" by {self.chunk} tokens"
        if self.allowed_s is not None:
            held += f", {format_seconds(self.allowed_s)} a token allowed"
        return (
            f"{self.situation.waiting} prompts and {self.situation.decoding} decoding lose "
            f"{self.apart_s(cut):.3g} request-seconds each chunk divided, {self.together_s:.3g} "
            f"undivided{held}"
        )

    def _lost_s(self, choice: int | None) -> float:
        return self.together_s if choice is None else self.apart_s(choice)

    def _token_s(self, choice: int | None) -> float:
        return self.mixed_s if choice is None else self.divided(choice).decode_s

    def _breaks(self, token_s: float) -> bool:
        return self.allowed_s is not None and token_s > self.allowed_s
