"""A call on the model from its arrival to its last token, and how its tokens are chosen."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from toolkit.errors import UsageError


class Phase(enum.Enum):
    """Which half of a call a token belongs to; the two load a device in opposite ways."""

    PREFILL = "prefill"
    DECODE = "decode"


class Status(enum.Enum):
    """Where a request is: queued, holding KV blocks, or done."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.Enum):
    """Why a request ended. The first two are OpenAI's `finish_reason`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when generation ends. Temperature 0 is greedy.

    `seed` makes a request's tokens repeatable whatever runs beside it; None lets the engine draw
    one. `max_tokens` None means up to the context limit. `stop` holds strings, which end the text
    and do not appear in it; `stop_token_ids` ends it by token.

    >>> SamplingParams(top_p=0)
    Traceback (most recent call last):
    toolkit.errors.UsageError: top_p is 0; it must be above 0 and at most 1
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        rules = (
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 100, "between 0 and 100"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("stop", all(self.stop), "non-empty strings"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise UsageError(f"{name} is {getattr(self, name)!r}; it must be {rule}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(slots=True, eq=False)
class Request:
    """One call and its progress. Mutable: the scheduler owns it, and it alone changes it.

    `num_computed` counts the tokens whose KV lies in `block_ids`. `arrival_seq` is given when the
    scheduler first sees the request and is kept through preemption. `priority` is for the policies
    that heed it, smaller first. Requests of another `cache_salt` share no cached prefix with it.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    arrival_s: float = 0.0
    program_id: str | None = None
    priority: int = 0
    cache_salt: str = ""
    arrival_seq: int = -1
    seed: int = 0
    max_total_tokens: int = 0

    status: Status = Status.WAITING
    phase: Phase = Phase.PREFILL
    output_ids: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    # Names of its full blocks so far; how many tokens the cache held for it when it was first
    # admitted, and holds while it waits.
    block_names: list[bytes] = field(default_factory=list)
    num_cached: int = 0
    num_reusable: int = 0
    num_computed: int = 0
    in_flight: bool = False
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None

    scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    finished_s: float | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens so far."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_pending(self) -> int:
        """Tokens known and not yet computed: the prompt's rest, or 1 while decoding."""
        return self.num_tokens - self.num_computed

    def tokens(self, start: int, end: int) -> Sequence[int]:
        """Return the token ids at positions [start, end) of prompt and output together.

        >>> request = Request("a", (5, 6, 7), SamplingParams(), output_ids=[8, 9])
        >>> list(request.tokens(2, 4)), list(request.tokens(4, 5))
        ([7, 8], [9])
        """
        split = len(self.prompt_ids)
        if start >= split:
            return self.output_ids[start - split : end - split]
        if end <= split:
            return self.prompt_ids[start:end]
        return [*self.prompt_ids[start:], *self.output_ids[: end - split]]
