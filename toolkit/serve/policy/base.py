"""The contract of a scheduling policy: it orders calls, and hears what happens to them."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from toolkit.serve.programs.table import Program
from toolkit.serve.request import Request

# Smaller goes first. Compared with other keys of the same policy only.
Key = tuple[Any, ...]


class Policy(ABC):
    """Orders calls. Hooks keep whatever state the order needs; most policies need none.

    A policy decides order only: admission, chunking and preemption are the scheduler's. Times are
    passed in, and a key may change only on one of these events or at `next_change`.
    """

    name: ClassVar[str]
    # Whether a key depends on how much of a waiting call the prefix cache holds.
    ranks_cached: ClassVar[bool] = False

    def fresh(self) -> Policy:
        """Return the same policy, knowing of no call. One that keeps state overrides this."""
        return copy.copy(self)

    @abstractmethod
    def key(self, call: Request, program: Program | None, now: float) -> Key:
        """Return the call's place. Ends in (arrival_seq, id), so that the order is total."""

    def on_arrival(  # noqa: B027
        self, call: Request, program: Program | None, now: float
    ) -> None:
        """The call has joined the queue."""

    def on_service(  # noqa: B027
        self, call: Request, program: Program | None, seconds: float, tokens: int, now: float
    ) -> None:
        """A step that took `seconds` computed `tokens` of the call."""

    def on_admit(  # noqa: B027
        self, call: Request, program: Program | None, now: float
    ) -> None:
        """The call has got a place and blocks, for the first time or again."""

    def on_services(
        self,
        call: Request,
        program: Program | None,
        took_s: Sequence[float],
        ends_s: Sequence[float],
    ) -> None:
        """Steps that took `took_s` and ended at `ends_s` computed a token each of the call.

        The same as `on_service` step by step, for whoever takes many at once.
        """
        if self.hears_service:
            for seconds, end_s in zip(took_s, ends_s, strict=True):
                self.on_service(call, program, seconds, 1, end_s)

    def service_left_s(self, call: Request) -> float:
        """Return how much service the call can get before its key may change by it."""
        return 0.0 if self.hears_service else math.inf

    def steps_left(self, call: Request) -> float:
        """Return how many steps of decoding the call can make before its key may change by them."""
        return math.inf

    @property
    def hears_service(self) -> bool:
        """Whether `on_service` does anything."""
        return type(self).on_service is not Policy.on_service

    @property
    def preempts(self) -> bool:
        """Whether `outranks` may ever say so."""
        return type(self).outranks is not Policy.outranks

    def on_complete(  # noqa: B027
        self, call: Request, program: Program | None, now: float
    ) -> None:
        """The call has finished, for whatever reason."""

    def on_preempt(self, call: Request, now: float) -> None:  # noqa: B027
        """The call lost its blocks and waits again."""

    def outranks(self, waiting: Request, resident: Request) -> bool:
        """Return whether `waiting` may take the place of `resident`, which is then recomputed."""
        return False

    def next_change(self, now: float) -> float | None:
        """Return when a waiting call's key next changes without an event, or None for never."""
        return None

    def changed(self, now: float) -> Collection[Request] | None:
        """Return the waiting calls whose keys time has changed by `now`; None: it may be all."""
        return None


__all__ = ["Key", "Policy", "Program"]
