"""Between HTTP and the engine: calls opened, their outputs awaited, the rest aborted on leaving."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import TypeVar

from toolkit.serve.engine import Engine, Output, StepReport
from toolkit.serve.model.tokenizer import Tokenizer
from toolkit.serve.request import Request, SamplingParams
from toolkit.serve.server.metrics import Metrics
from toolkit.serve.worker import EngineDeadError, Submission, Worker

T = TypeVar("T")

# A step never takes this long unless something hangs: /health says so.
_WEDGED_S = 120.0


class Call:
    """The choices of one HTTP request. `async with` it: leaving aborts whatever still runs."""

    def __init__(self, service: Service, requests: Sequence[Request]) -> None:
        self.requests = tuple(requests)
        self._service = service
        self._news: asyncio.Queue[Output | EngineDeadError] = asyncio.Queue()
        self._index = {request.id: i for i, request in enumerate(requests)}
        self._open = dict.fromkeys(self._index)

    def tell(self, news: Output | EngineDeadError) -> None:
        """Take what the engine says about one of these requests."""
        self._news.put_nowait(news)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Output]]:
        """Yield (choice, output) until every choice has ended. Raises EngineDeadError."""
        while self._open:
            news = await self._news.get()
            if isinstance(news, EngineDeadError):
                self._open.clear()
                raise news
            if news.finish_reason is not None:
                self._open.pop(news.request.id)
            yield self._index[news.request.id], news

    async def __aenter__(self) -> Call:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._service.leave(self, [r for r in self.requests if r.id in self._open])


class Service:
    """An engine's worker as the event loop sees it. All methods belong to the loop's thread."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, model_name: str, vocab_size: int
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.vocab_size = vocab_size
        self.metrics = Metrics(engine, model_name)
        self.draining = False
        self._calls: dict[str, Call] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker = Worker(
            engine, self._from_engine(self._stepped), self._from_engine(self._died)
        )

    def start(self) -> None:
        """Start the engine's thread; its news come to the running loop."""
        self._loop = asyncio.get_running_loop()
        self._worker.start()

    def stop(self) -> None:
        """Stop the engine after its present step."""
        self._worker.stop()

    @property
    def trouble(self) -> str | None:
        """What is wrong with the engine, or None. Never waits for it."""
        if not self._worker.alive:
            return "the engine is not running"
        if self._worker.busy_s > _WEDGED_S:
            return f"the engine has been in one step for {self._worker.busy_s:.0f} s"
        return "the server is shutting down" if self.draining else None

    @property
    def retry_after_s(self) -> int:
        """A guess at when the queue has moved: a second for every batch that waits, at most 60."""
        waiting, batch = self._worker.num_waiting, self.engine.scheduler.config.max_batch
        return min(60, 1 + waiting // batch)

    def open(
        self, prompts: Sequence[Sequence[int]], params: Callable[[int], SamplingParams], num: int
    ) -> Call:
        """Submit `num` choices of each prompt, `params(i)` saying how the i-th is drawn.

        Raises UsageError, QueueFullError or EngineDeadError, and then nothing was submitted.
        """
        now = self.engine.clock.now()
        stem = uuid.uuid4().hex
        submissions: list[Submission] = []
        for prompt in prompts:
            for choice in range(num):
                request = Request(
                    f"{stem}-{len(submissions)}", tuple(prompt), params(choice), arrival_s=now
                )
                stream = self.tokenizer.stream(request.prompt_ids, request.sampling.stop)
                submissions.append(Submission(request, stream))
        call = Call(self, [submission.request for submission in submissions])
        self._worker.submit(submissions)
        self._calls.update((request.id, call) for request in call.requests)
        return call

    def leave(self, call: Call, unfinished: Sequence[Request]) -> None:
        """Forget a call and abort what it leaves unfinished."""
        for request in call.requests:
            self._calls.pop(request.id, None)
        if unfinished:
            self._worker.abort(unfinished)

    def _from_engine(self, receive: Callable[[T], None]) -> Callable[[T], None]:
        """Return what the engine's thread calls so that `receive` runs in the loop."""

        def post(news: T) -> None:
            assert self._loop is not None, "news came before start()"
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(receive, news)

        return post

    def _stepped(self, report: StepReport) -> None:
        self.metrics.step(report)
        for output in report.outputs:
            call = self._calls.get(output.request.id)
            if call is not None:
                call.tell(output)

    def _died(self, error: EngineDeadError) -> None:
        for call in set(self._calls.values()):
            call.tell(error)
