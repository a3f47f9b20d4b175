"""A call on the model from its arrival to its last token, and how its tokens are chosen."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from toolkit.errors import UsageError
from toolkit.serve.structured import Grammar, Structured

if TYPE_CHECKING:
    from toolkit.serve.programs.table import Program

# As in vLLM, and OpenAI's chat.
_MAX_LOGPROBS = 20


class TooLongError(UsageError):
    """A prompt that the context can never hold."""

    kind = "context-length"


class Phase(enum.Enum):
    """Which half of a call a token belongs to; the two load a device in opposite ways."""

    PREFILL = "prefill"
    DECODE = "decode"

    # Members are singletons; Enum's own hash is a function in Python, and phases are looked up at
    # every step.
    __hash__ = object.__hash__


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
    and do not appear in it unless `include_stop`; `stop_token_ids` ends it by token. Neither, nor
    the model's end of text, takes effect within the first `min_tokens`.

    Logits are changed in this order: `logit_bias` (token id, what is added) and the ban on ends;
    `repetition_penalty` (divides a positive and multiplies a negative logit of every token in
    prompt and output: CTRL, arXiv 1909.05858); `frequency_penalty` times a token's count in the
    output, and `presence_penalty` for being there at all; a grammar; temperature; top-k, top-p,
    min-p. `logprobs` (how many of the likeliest, 0 for the chosen token only) and
    `prompt_logprobs` report log-probabilities of the logits before all of that. `structured` says
    what the text must be.

    >>> SamplingParams(top_p=0)
    Traceback (most recent call last):
    toolkit.errors.UsageError: top_p is 0; it must be above 0 and at most 1
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    include_stop: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured: Structured | None = None

    def __post_init__(self) -> None:
        most = self.max_tokens or self.min_tokens
        rules = (
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 100, "between 0 and 100"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "between 0.01 and 100"),
            ("stop", all(self.stop), "non-empty strings"),
            ("min_tokens", 0 <= self.min_tokens <= most, "0 or more, at most max_tokens"),
            ("logprobs", 0 <= (self.logprobs or 0) <= _MAX_LOGPROBS, f"0 to {_MAX_LOGPROBS}"),
            (
                "prompt_logprobs",
                0 <= (self.prompt_logprobs or 0) <= _MAX_LOGPROBS,
                f"0 to {_MAX_LOGPROBS}",
            ),
        )
        for name, holds, rule in rules:
            if not holds:
                raise UsageError(f"{name} is {getattr(self, name)!r}; it must be {rule}")

    @property
    def greedy(self) -> bool:
        # Below this, as in vLLM: what it would be divided by leaves the range of floats.
        return self.temperature < 1e-5

    @property
    def changes_logits(self) -> bool:
        """Whether logits are altered before temperature and cuts, a grammar aside."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1)
        return bool(self.logit_bias or self.min_tokens or any(penalties))


def check_ids(params: SamplingParams, vocab_size: int) -> None:
    """Raise UsageError where a token is named that the model does not have."""
    biased = (token for token, _ in params.logit_bias)
    for name, ids in (("logit_bias", biased), ("stop_token_ids", params.stop_token_ids)):
        wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise UsageError(
                f"{name} has token id {wrong}, which is not in the vocabulary of {vocab_size}"
            )


@dataclass(slots=True, eq=False)
class Request:
    """One call and its progress. Mutable: the scheduler owns it, and it alone changes it.

    `num_computed` counts the tokens whose KV lies in `block_ids`. `arrival_seq` is given when the
    scheduler first sees the request and is kept through preemption. `priority` is for the policies
    that heed it, smaller first. Requests of another `cache_salt` share no cached prefix with it.
    `ends_program`: its client says that no call of its program follows.
    `grammar` is the state of `sampling.structured`; `pooled` asks for the mean of the prompt's last
    hidden states, beside which the one token drawn means nothing.
    """

    id: str
    prompt_ids: Sequence[int]
    sampling: SamplingParams
    arrival_s: float = 0.0
    program_id: str | None = None
    thread_id: str | None = None
    ends_program: bool = False
    priority: int = 0
    cache_salt: str = ""
    grammar: Grammar | None = None
    pooled: bool = False
    arrival_seq: int = -1
    seed: int = 0
    max_total_tokens: int = 0
    # The tokens that end it, found out when it arrives.
    end_ids: frozenset[int] = frozenset()

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

    # Its program's entry in the process table; since when it has waited or run, and how long it
    # did either before.
    program: Program | None = None
    since_s: float = 0.0
    waited_s: float = 0.0
    served_s: float = 0.0

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

    def service_s(self, now: float) -> float:
        """Return for how long it has held a place in the batch, all together."""
        running = now - self.since_s if self.status is Status.RUNNING else 0.0
        return self.served_s + running

    def waiting_s(self, now: float) -> float:
        """Return for how long it has waited, all together."""
        waiting = now - self.since_s if self.status is Status.WAITING else 0.0
        return self.waited_s + waiting

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
