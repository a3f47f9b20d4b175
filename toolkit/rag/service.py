"""Answers over HTTP: questions in, text, sources and the timeline out, streamed as it happens.

    POST /ask      {"question"} and, if wanted, pipeline, k, nprobe, lookahead, hybrid, where,
                   max_tokens:
                   server-sent events: `text` (a piece each), then `answer` (all of it) or `error`
    POST /search   {"query", "k"?, "nprobe"?}     the passages
    GET  /health   what is served;  GET /metrics  Prometheus;  GET /  a page to ask on

Searches of questions that are asked at the same time are grouped (batch.py). An index that was
changed meanwhile is gone on with, keeping what is in memory.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from toolkit import __version__
from toolkit.errors import FormatError, ToolkitError, UsageError, require
from toolkit.log import get_logger
from toolkit.rag.answer import ask
from toolkit.rag.batch import Grouping
from toolkit.rag.foresight import find_mode
from toolkit.rag.generator import EndpointError, Generator
from toolkit.rag.lexical import Lexical
from toolkit.rag.pipelines import find as find_pipeline
from toolkit.rag.retriever import Retriever

_log = get_logger(__name__)
_PAGE = Path(__file__).with_name("ask.html")


class Question(BaseModel):
    """What /ask takes; an unknown field is an error."""

    model_config = ConfigDict(extra="forbid")
    question: str = Field(min_length=1, max_length=8000)
    pipeline: str = "plain"
    k: int = Field(4, ge=1, le=100)
    nprobe: int | None = Field(None, ge=1)
    lookahead: str = "progressive"
    hybrid: bool = False
    where: list[str] = Field(default_factory=list)
    max_tokens: int = Field(160, ge=1, le=4096)


class Query(BaseModel):
    """What /search takes; an unknown field is an error."""

    model_config = ConfigDict(extra="forbid")
    query: str = Field(min_length=1, max_length=8000)
    k: int = Field(5, ge=1, le=1000)
    nprobe: int | None = Field(None, ge=1)
    where: list[str] = Field(default_factory=list)


class Service:
    """One index, one model, and the counts of what was asked of them."""

    def __init__(
        self, retriever: Retriever, generator: Generator, *, most_at_once: int = 8
    ) -> None:  # fmt: skip
        """Answer at most `most_at_once` questions at a time; more of them wait."""
        prometheus = require("prometheus_client", extra="serve")
        self.retriever = Grouping(retriever)
        self.generator = generator
        self._room = threading.Semaphore(most_at_once)
        self._lexical: Lexical | None = None
        self._lock = threading.Lock()
        self.registry = prometheus.CollectorRegistry()
        name = "toolkit_rag"
        self._asked = prometheus.Counter(
            f"{name}_questions", "Questions answered, by outcome.", ["outcome"],
            registry=self.registry,
        )  # fmt: skip
        seconds = {"registry": self.registry, "buckets": (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32)}
        self._total_s = prometheus.Histogram(
            f"{name}_answer_seconds", "From a question to its whole answer.", **seconds
        )
        self._wait_s = prometheus.Histogram(
            f"{name}_search_seconds", "From the end of a text to its passages.", **seconds
        )
        self._ahead = prometheus.Counter(
            f"{name}_lookahead_bytes", "Bytes read ahead of a search.", ["use"],
            registry=self.registry,
        )  # fmt: skip
        tiers = retriever.tiers
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "memory_bytes": ("Memory taken by lists.", lambda: tiers.arena.used_bytes),
            "memory_budget_bytes": ("Memory lists may take.", lambda: tiers.arena.budget_bytes),
            "read_bytes": ("Bytes read from disk.", lambda: tiers.traffic().read_bytes),
            "evicted_bytes": ("Bytes of lists given up.", lambda: tiers.traffic().evicted_bytes),
            "passages": ("Passages in the index.", lambda: self.retriever.store.num_vectors),
        }
        for what, (says, value) in gauges.items():
            gauge = prometheus.Gauge(f"{name}_{what}", says, registry=self.registry)
            gauge.set_function(value)

    def answer(self, asked: Question, on_text: Callable[[str], None]) -> dict[str, Any]:
        """Answer one question; `on_text` sees its pieces. Raises ToolkitError."""
        try:
            with self._room:
                self.refresh()
                found = ask(
                    self.retriever, self.generator, asked.question, pipeline=asked.pipeline,
                    k=asked.k, nprobe=asked.nprobe, max_tokens=asked.max_tokens,
                    lookahead=find_mode(asked.lookahead),
                    lexical=self._words() if asked.hybrid else None, where=asked.where,
                    on_text=on_text,
                )  # fmt: skip
        except ToolkitError as error:
            self._asked.labels(error.kind).inc()
            raise
        self._asked.labels("found" if found.found else "not found").inc()
        self._total_s.observe(found.timings["total_s"])
        for wait_s in found.waits_s:
            self._wait_s.observe(wait_s)
        for ahead in found.aheads:
            self._ahead.labels("used").inc(ahead.used_bytes)
            self._ahead.labels("wasted").inc(ahead.wasted_bytes)
        return found.to_json()

    def search(self, asked: Query) -> list[dict[str, Any]]:
        """Return the passages of one query."""
        self.refresh()
        hits = self.retriever.search(asked.query, asked.k, asked.nprobe, where=asked.where)
        return [{"score": hit.score, **asdict(hit.passage)} for hit in hits]

    def refresh(self) -> None:
        """Go on with the index as it is now; one that cannot be opened leaves the old one."""
        with self._lock:
            try:
                if self.retriever.refresh():
                    self._lexical = None
            except (FormatError, UsageError, OSError) as error:
                _log.warning("the index was changed and cannot be gone on with: %s", error)

    def _words(self) -> Lexical:
        with self._lock:
            self._lexical = self._lexical or Lexical.open(self.retriever)
            return self._lexical

    def close(self) -> None:
        """Finish what waits and close the index."""
        self.retriever.close()


def create(service: Service) -> Any:
    """Return the application (FastAPI) in front of a service."""
    fastapi = require("fastapi", extra="serve")
    responses = require("fastapi.responses", extra="serve")
    prometheus = require("prometheus_client", extra="serve")
    app = fastapi.FastAPI(title="toolkit rag serve", version=__version__)

    async def answer(asked: Question) -> Any:
        find_pipeline(asked.pipeline)  # wrong names are said before the stream begins
        find_mode(asked.lookahead)
        service.retriever.probes(asked.nprobe)
        return responses.StreamingResponse(
            _events(service, asked), media_type="text/event-stream"
        )  # fmt: skip

    async def search(asked: Query) -> Any:
        return await asyncio.to_thread(service.search, asked)

    def health() -> dict[str, Any]:
        store = service.retriever.store
        return {
            "status": "ok",
            "index": str(store.path),
            "passages": store.num_vectors,
            "lists": service.retriever.num_lists,
            "nprobe": service.retriever.probes(),
            "memory_budget_bytes": service.retriever.tiers.arena.budget_bytes,
        }

    def metrics() -> Any:
        return responses.PlainTextResponse(prometheus.generate_latest(service.registry))

    def page() -> Any:
        return responses.HTMLResponse(_PAGE.read_text(encoding="utf-8"))

    def refused(_: Any, error: ToolkitError) -> Any:
        status = 400 if isinstance(error, UsageError) else 502
        status = status if isinstance(error, UsageError | EndpointError) else 500
        return responses.JSONResponse({"error": _said(error)}, status)

    app.post("/ask")(answer)
    app.post("/search")(search)
    app.get("/health")(health)
    app.get("/metrics")(metrics)
    app.get("/", include_in_schema=False)(page)
    app.exception_handler(ToolkitError)(refused)
    return app


async def _events(service: Service, asked: Question) -> AsyncIterator[str]:
    """Yield the events of one answer, which is made on a thread of its own."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
    left = threading.Event()

    def put(event: str, body: Any) -> None:
        if left.is_set():
            raise _LeftError
        loop.call_soon_threadsafe(queue.put_nowait, (event, body))

    def work() -> None:
        try:
            put("answer", service.answer(asked, lambda text: put("text", {"text": text})))
        except _LeftError:
            return  # whoever asked has gone: the generation was closed on the way here
        except ToolkitError as error:
            put("error", _said(error))
        except Exception as error:  # a reader of the stream is told of bugs too
            _log.exception("answering failed")
            put("error", {"kind": "bug", "message": f"{type(error).__name__}: {error}"})

    threading.Thread(target=work, name="answer", daemon=True).start()
    try:
        while True:
            event, body = await queue.get()
            yield f"event: {event}\ndata: {json.dumps(body)}\n\n"
            if event != "text":
                return
    finally:
        left.set()


class _LeftError(Exception):
    """Whoever asked is no longer there."""


def _said(error: ToolkitError) -> dict[str, Any]:
    return {"kind": error.kind, "message": error.message, "remedy": error.remedy}
