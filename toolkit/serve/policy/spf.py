"""Shortest prompt first with ageing (Nexus, arXiv 2507.06608 v5, its prefill scheduler)."""

from __future__ import annotations

from typing import ClassVar

from toolkit.errors import UsageError
from toolkit.serve.policy.base import Key, Policy, Program
from toolkit.serve.request import Request


class ShortestPromptFirst(Policy):
    """Serve the call with the fewest tokens left to prefill, each second of age forgiving gamma.

    Tokens that the prefix cache holds cost nothing and are not counted.

    Nexus sorts by `remaining - gamma * (now - arrival)`. All calls share `now`, so
    `remaining + gamma * arrival` gives the same order and changes only when a chunk is computed.
    A call of L tokens outranks every new one of l tokens after (L - l) / gamma seconds, so with
    the paper's gamma of 15 tokens/s a long prompt can wait for minutes: raise it to wait less.
    """

    name: ClassVar[str] = "spf"
    ranks_cached: ClassVar[bool] = True

    def __init__(self, gamma: float = 15.0) -> None:
        """`gamma`: tokens forgiven per second of waiting; 0 is shortest job first."""
        if gamma < 0:
            raise UsageError(f"gamma is {gamma}; it must be 0 or more")
        self.gamma = gamma

    def key(self, call: Request, program: Program | None, now: float) -> Key:
        left = call.num_pending - call.num_reusable
        return (left + self.gamma * call.arrival_s, call.arrival_seq, call.id)
