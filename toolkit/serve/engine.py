"""The loop: schedule -> run -> postprocess. Everything else in the pillar serves these lines."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from toolkit.serve.batch import Batch, Score, StepResult
from toolkit.serve.clock import Clock
from toolkit.serve.executor.base import Executor
from toolkit.serve.journal import Journal
from toolkit.serve.request import FinishReason, Phase, Request
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


class Output(NamedTuple):
    """One step's news of one request; `index` and `gap_s` as in the scheduler's Token.

    `prompt_scores` come with the first token, one for every prompt token but the first, and so does
    `hidden_mean`, the mean of the prompt's last hidden states.
    """

    request: Request
    token_id: int
    index: int  # type: ignore[assignment]  # a tuple's `index` is of no use here
    gap_s: float
    text: str
    finish_reason: FinishReason | None
    score: Score | None = None
    prompt_scores: tuple[Score, ...] = ()
    hidden_mean: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Divided:
    """What a divided engine says of a step: its phase (None: both), on how many of the units.

    `predicted_s` is what it was expected to take; None for one that was `lost` and is done again.
    """

    phase: Phase | None
    units: int
    predicted_s: float | None
    lost: bool = False


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did: its outputs, how many tokens it computed, of prompts too, and when."""

    outputs: tuple[Output, ...]
    num_tokens: int
    num_prefilled: int
    start_s: float
    end_s: float
    divided: Divided | None = None


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
        # Of prompts being scored, by request; a preempted one is not scored twice.
        self._scores: dict[str, list[Score]] = {}
        self._hidden_sums: dict[str, tuple[float, ...]] = {}

    def successor(self) -> Engine:
        """Return an engine like this one with nothing in it: this one cannot be trusted any more.

        Whoever waits for requests given to this one must be told; they are not carried over.
        """
        return Engine(
            self.scheduler.successor(),
            self.executor.successor(),
            self.clock,
            journal=self.journal,
            seed=self._random.getrandbits(63),
        )

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def in_flight_since_s(self) -> float | None:
        """When the oldest step that outlasts a call of `step` began, by the engine's clock."""
        return None

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
        batch = self._schedule(start_s)
        result = self._run(batch)
        end_s = self.clock.now()
        self._collect(batch, result)
        drawn = self.scheduler.update(batch, result.token_ids, end_s, end_s - start_s)
        return self._postprocess(batch, result, drawn, start_s, end_s)

    def timeline(self, title: str = "serving") -> Timeline:
        """Return the engine's recent steps and finished requests as spans."""
        return self.journal.timeline(title)

    def _schedule(self, now: float) -> Batch:
        return self.scheduler.schedule(now)

    def _run(self, batch: Batch) -> StepResult:
        try:
            return self.executor.run(batch)
        except BaseException:
            # Interrupted at the keyboard, most likely: the requests can still be gone on with.
            self.scheduler.cancel(batch)
            raise

    def _collect(self, batch: Batch, result: StepResult) -> None:
        """Keep what was found out about prompts until their first token is drawn."""
        for piece in batch.slices if result.details else ():
            detail = result.details.get(piece.request.id)
            if detail is None or piece.request.finish_reason is not None:
                continue
            name = piece.request.id
            if detail.prompt:
                known = self._scores.setdefault(name, [])
                known += detail.prompt[len(known) - piece.start :]
            if detail.hidden_sum:
                # A preempted one begins anew.
                before = self._hidden_sums.get(name) if piece.start else None
                sums = zip(before, detail.hidden_sum, strict=True) if before else ()
                self._hidden_sums[name] = tuple(map(sum, sums)) or detail.hidden_sum

    def _postprocess(
        self, batch: Batch, result: StepResult, drawn: list[Token], start_s: float, end_s: float
    ) -> StepReport:
        queue, pool = self.scheduler.queue, self.scheduler.pool
        self.journal.step(
            batch, start_s, end_s, num_waiting=queue.num_requests, kv_usage=pool.usage
        )
        outputs = []
        for token in drawn:
            request, reason, text = token.request, token.finish_reason, ""
            # Most steps have none of these, and this is done for every token.
            detail = result.details.get(request.id) if result.details else None
            prompt_scores = tuple(self._scores.pop(request.id, ())) if self._scores else ()
            hidden_sum = self._hidden_sums.pop(request.id, ()) if self._hidden_sums else ()
            stream = self._streams.get(request.id) if self._streams else None
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
            outputs.append(
                Output(
                    *(request, token.token_id, token.index, token.gap_s, text, reason),
                    detail.score if detail else None,
                    prompt_scores,
                    tuple(value / len(request.prompt_ids) for value in hidden_sum)
                    if hidden_sum
                    else (),
                )
            )
        prefilled = sum(piece.num_tokens for piece in batch.of(Phase.PREFILL))
        return StepReport(tuple(outputs), batch.num_tokens, prefilled, start_s, end_s)

    def _end(self, request: Request, reason: FinishReason) -> None:
        self.scheduler.finish(request, reason, self.clock.now())
        self._streams.pop(request.id, None)
        self._scores.pop(request.id, None)
        self._hidden_sums.pop(request.id, None)
        self.journal.finished(request)
