"""The limits of a scheduler: how much at once, how long, how many may wait."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.errors import UsageError


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of the scheduler.

    `max_batch` requests hold blocks at once; a step computes at most `step_tokens`, of which
    decoding requests take one each and prefill chunks the rest (chunked prefill, as in
    Sarathi-Serve). `max_context` bounds prompt and output together. `prefix_cache` shares the
    blocks of equal contexts across requests. `max_queue` and `max_queue_tokens` cap what waits
    (None: no cap). `eos_ids` end a request.
    """

    max_batch: int = 32
    step_tokens: int = 256
    max_context: int = 2048
    prefix_cache: bool = True
    max_queue: int | None = None
    max_queue_tokens: int | None = None
    eos_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise UsageError(
                f"a batch of {self.max_batch} requests is none", remedy="use 1 or more"
            )
        if self.step_tokens <= self.max_batch:
            raise UsageError(
                f"{self.step_tokens} tokens a step leave nothing for prefill beside "
                f"{self.max_batch} decoding requests",
                remedy="raise the tokens a step, or lower the batch",
            )
        for what, cap in (("requests", self.max_queue), ("tokens", self.max_queue_tokens)):
            if cap is not None and cap < 1:
                raise UsageError(f"a queue of {cap} {what} lets nobody in", remedy="use 1 or more")
