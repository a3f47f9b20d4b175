"""Between HTTP and the engine: calls opened, their outputs awaited, the rest aborted on leaving."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from toolkit import log
from toolkit.serve.engine import Engine, Output, StepReport
from toolkit.serve.grammar import Grammars
from toolkit.serve.model.tokenizer import Tokenizer
from toolkit.serve.programs.identity import Identity
from toolkit.serve.request import Request, SamplingParams, check_ids
from toolkit.serve.server.live import Live
from toolkit.serve.server.metrics import Metrics
from toolkit.serve.server.split_view import SplitLive
from toolkit.serve.server.tool_calls import format_of
from toolkit.serve.split.engine import DividedEngine
from toolkit.serve.worker import EngineDeadError, Submission, Worker

logger = log.get_logger(__name__)

# An engine that dies again and again has a cause that another start does not cure.
_MOST_RESTARTS, _RESTART_WINDOW_S = 3, 600.0


@dataclass(frozen=True)
class Patience:
    """How long a step may take: no step does unless something hangs.

    After `unhealthy_s` /health says so; after `replace_s` the engine is given up, its requests are
    told, and another takes its place.
    """

    unhealthy_s: float = 60.0
    replace_s: float = 120.0


@dataclass(frozen=True)
class Ask:
    """What one HTTP request wants generated: `num` choices of each prompt.

    `sampling(i)` says how the i-th choice is drawn. `pooled` asks for embeddings instead. `prefix`
    begins the answer's id, and `identity` names the program that asks.
    """

    prompts: Sequence[Sequence[int]]
    sampling: Callable[[int], SamplingParams]
    num: int = 1
    priority: int = 0
    cache_salt: str = ""
    pooled: bool = False
    prefix: str = "cmpl"
    identity: Identity | None = None


class Call:
    """The choices of one HTTP request. `async with` it: leaving aborts whatever still runs."""

    def __init__(self, service: Service, stem: str, requests: Sequence[Request], num: int) -> None:
        """`stem` is the answer's id; `num` requests after another have the same prompt."""
        self.id = stem
        self.requests = tuple(requests)
        self.firsts = self.requests[::num]
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
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        model_name: str,
        vocab_size: int,
        *,
        patience: Patience | None = None,
        tool_format: str | None = None,
    ) -> None:
        """`tool_format`: how the model writes tool calls; None: as its chat template teaches it."""
        self.engine = engine
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.vocab_size = vocab_size
        self.grammars = Grammars(tokenizer, vocab_size, engine.scheduler.config.eos_ids)
        self.metrics = Metrics(engine, model_name)
        self.live, self.split_live = Live(), SplitLive()
        self.tool_format = tool_format or format_of(tokenizer.chat_template)
        self.draining = False
        # Why no engine is started again, and who is to hear of it: the process is of no more use.
        self.lost: EngineDeadError | None = None
        self.on_lost: Callable[[], None] = lambda: None
        self._patience = patience or Patience()
        self._calls: dict[str, Call] = {}
        self._restarts_s: deque[float] = deque(maxlen=_MOST_RESTARTS)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._worker = self._hire(engine)

    def start(self) -> None:
        """Start the engine's thread; its news come to the running loop."""
        self._loop = asyncio.get_running_loop()
        self._worker.start()
        self._watcher = self._loop.create_task(self._watch())

    def stop(self) -> None:
        """Stop the engine after its present step. Not for the loop's thread: it waits."""
        if self._watcher is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._watcher.cancel)
        self._worker.stop()

    @property
    def trouble(self) -> str | None:
        """What is wrong with the engine, or None. Never waits for it."""
        if not self._worker.alive:
            return "the engine is not running"
        if self._worker.busy_s > self._patience.unhealthy_s:
            return f"the engine has been in one step for {self._worker.busy_s:.0f} s"
        return "the server is shutting down" if self.draining else None

    @property
    def num_waiting(self) -> int:
        return self._worker.num_waiting

    @property
    def retry_after_s(self) -> int:
        """A guess at when the queue has moved: a second for every batch that waits, at most 60."""
        return min(60, 1 + self.num_waiting // self.engine.scheduler.config.max_batch)

    async def open(self, ask: Ask) -> Call:
        """Submit what is asked for.

        Raises UsageError, QueueFullError or EngineDeadError, and then nothing was submitted.
        """
        stem = f"{ask.prefix}-{uuid.uuid4().hex}"
        submissions: list[Submission] = []
        for prompt in ask.prompts:
            for choice in range(ask.num):
                params = ask.sampling(choice)
                check_ids(params, self.vocab_size)
                request = Request(
                    f"{stem}-{len(submissions)}",
                    tuple(prompt),
                    params,
                    arrival_s=self.engine.clock.now(),
                    priority=ask.priority,
                    cache_salt=ask.cache_salt,
                    pooled=ask.pooled,
                )
                if ask.identity is not None:
                    request.program_id = ask.identity.program_id
                    request.thread_id = ask.identity.thread_id
                    request.ends_program = ask.identity.ends
                if params.structured is not None:
                    # Compiling may take a while: others are served meanwhile.
                    matcher = await asyncio.wrap_future(self.grammars.submit(params.structured))
                    request.grammar = matcher
                stream = self.tokenizer.stream(request.prompt_ids, params)
                submissions.append(Submission(request, stream))
        call = Call(self, stem, [submission.request for submission in submissions], ask.num)
        self._worker.submit(submissions)
        self._calls.update((request.id, call) for request in call.requests)
        return call

    def leave(self, call: Call, unfinished: Sequence[Request]) -> None:
        """Forget a call and abort what it leaves unfinished."""
        for request in call.requests:
            self._calls.pop(request.id, None)
        if unfinished:
            self._worker.abort(unfinished)

    # -- the worker, and what becomes of it ------------------------------------------------------

    def _hire(self, engine: Engine) -> Worker:
        """Return a worker for `engine` whose news come to the loop while it is the present one."""

        def stepped(report: StepReport) -> None:
            self._post(lambda: self._stepped(worker, report))

        def died(error: EngineDeadError) -> None:
            self._post(lambda: self._replace(worker, error))

        worker = Worker(engine, stepped, died)
        return worker

    def _post(self, receive: Callable[[], None]) -> None:
        assert self._loop is not None, "news came before start()"
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(receive)

    def _stepped(self, worker: Worker, report: StepReport) -> None:
        if worker is not self._worker:
            return
        self.metrics.step(report)
        self.live.step(report, self.engine.scheduler)
        if isinstance(self.engine, DividedEngine):
            self.split_live.step(report, self.engine.controller)
        for output in report.outputs:
            call = self._calls.get(output.request.id)
            if call is not None:
                call.tell(output)

    async def _watch(self) -> None:
        """Give the engine up when a step hangs."""
        while True:
            await asyncio.sleep(min(1.0, self._patience.replace_s / 4))
            busy_s = self._worker.busy_s
            if busy_s > self._patience.replace_s:
                error = f"the engine hung in one step for {busy_s:.0f} s and was given up"
                self._replace(self._worker, EngineDeadError(error))

    def _replace(self, worker: Worker, error: EngineDeadError) -> None:
        """Tell everyone that their requests are lost, and start another engine in this one's place.

        A hung thread cannot be ended: it keeps its old cache until its step returns, if ever.
        """
        if worker is not self._worker or self.lost is not None:
            return
        worker.abandon(error)
        for call in set(self._calls.values()):
            call.tell(error)
        self._calls.clear()
        now = time.monotonic()
        if self.draining:
            logger.error("the engine stays down: %s", error)
            return
        often = len(self._restarts_s) == _MOST_RESTARTS
        if often and now - self._restarts_s[0] < _RESTART_WINDOW_S:
            self.lost = EngineDeadError(
                f"{_MOST_RESTARTS + 1} faults within {_RESTART_WINDOW_S / 60:.0f} minutes, the "
                f"last: {error}",
                remedy="start the server again; the log has every fault",
            )
            self.on_lost()
            return
        self._restarts_s.append(now)
        logger.warning("starting the engine again: %s", error)
        self.engine = self.engine.successor()
        self.metrics.follow(self.engine)
        self.metrics.restarts.inc()
        self._worker = self._hire(self.engine)
        self._worker.start()
