"""The loop: schedule -> run -> postprocess. Everything else in the pillar serves these lines."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

from toolkit.serve.batch import Batch, StepResult
from toolkit.serve.clock import Clock
from toolkit.serve.executor.base import Executor
from toolkit.serve.journal import Journal
from toolkit.serve.request import FinishReason, Request
from toolkit.serve.scheduler import Scheduler, Token
from toolkit.timeline import Timeline


class TextStream(Protocol):
    """Turns one request's tokens into text, as they come."""

    def push(self, token_id: int) -> str:
        """Return the text that is certain once `token_id` has followed."""
        ...

    def flush(self) -> str:
        """Return what was held back; the request has ended."""
        ...

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been met; text from it on is not returned."""
        ...


@dataclass(frozen=True, slots=True)
class Output:
    """One step's news of one request; `index` and `gap_s` as in the scheduler's Token."""

    request: Request
    token_id: int
    index: int
    gap_s: float
    text: str
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did: its outputs, how many tokens it computed, and when."""

    outputs: tuple[Output, ...]
    num_tokens: int
    start_s: float
    end_s: float


class Engine:
    """A scheduler, what it drives, and the text that comes out. Used from one thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        clock: Clock,
        *,
        journal: Journal | None = None,
        seed: int = 0,
    ) -> None:
        """`seed` is where requests that bring none take theirs from."""
        self.scheduler = scheduler
        self.executor = executor
        self.clock = clock
        self.journal = journal or Journal()
        self._random = random.Random(seed)
        self._streams: dict[str, TextStream] = {}

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: Request, stream: TextStream | None = None) -> None:
        """Take a request; `stream` turns its tokens into text. Raises what the scheduler does."""
        seed = request.sampling.seed
        request.seed = self._random.getrandbits(63) if seed is None else seed
        self.scheduler.add(request, self.clock.now())
        if stream is not None:
            self._streams[request.id] = stream

    def abort(self, request: Request) -> None:
        """End a request whose client has gone. Safe at any time, and more than once."""
        if request.finish_reason is None:
            self._end(request, FinishReason.ABORT)

    def step(self) -> StepReport:
        """Advance every scheduled request once; report what they produced."""
        start_s = self.clock.now()
        batch = self.scheduler.schedule(start_s)
        result = self._run(batch)
        end_s = self.clock.now()
        drawn = self.scheduler.update(batch, result.token_ids, end_s, end_s - start_s)
        return self._postprocess(batch, drawn, start_s, end_s)

    def timeline(self, title: str = "serving") -> Timeline:
        """Return the engine's recent steps and finished requests as spans."""
        return self.journal.timeline(title)

    def _run(self, batch: Batch) -> StepResult:
        try:
            return self.executor.run(batch)
        except BaseException:
            # Interrupted at the keyboard, most likely: the requests can still be gone on with.
            self.scheduler.cancel(batch)
            raise

    def _postprocess(
        self, batch: Batch, drawn: list[Token], start_s: float, end_s: float
    ) -> StepReport:
        queue, pool = self.scheduler.queue, self.scheduler.pool
        self.journal.step(
            batch, start_s, end_s, num_waiting=queue.num_requests, kv_usage=pool.usage
        )
        outputs = []
        for token in drawn:
            request, reason, text = token.request, token.finish_reason, ""
            stream = self._streams.get(request.id)
            if stream is not None:
                # The token that stops a request is not part of its text.
                if reason is not FinishReason.STOP:
                    text = stream.push(token.token_id)
                if stream.stopped:
                    reason = FinishReason.STOP
                if reason is not None:
                    text += stream.flush()
            if reason is not None:
                self._end(request, reason)
            outputs.append(Output(request, token.token_id, token.index, token.gap_s, text, reason))
        return StepReport(tuple(outputs), batch.num_tokens, start_s, end_s)

    def _end(self, request: Request, reason: FinishReason) -> None:
        self.scheduler.finish(request, reason, self.clock.now())
        self._streams.pop(request.id, None)
        self.journal.finished(request)
