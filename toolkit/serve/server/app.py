"""The routes: OpenAI's completions and models, health, metrics, and the engine's timeline."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

import toolkit
from toolkit import record
from toolkit.errors import ToolkitError, UsageError
from toolkit.serve.server import failures
from toolkit.serve.server.protocol import ChatRequest, CompletionRequest
from toolkit.serve.server.responses import CHAT, COMPLETION, Answer
from toolkit.serve.server.service import Service
from toolkit.timeline import files


def create(service: Service) -> FastAPI:
    """Return the application in front of `service`, which it starts and stops."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(title="toolkit serve", version=toolkit.__version__, lifespan=lifespan)
    created = int(time.time())
    context = service.engine.scheduler.config.max_context

    @app.exception_handler(ToolkitError)
    async def _ours(_: Request, error: ToolkitError) -> JSONResponse:
        return failures.of_toolkit(error, retry_after_s=service.retry_after_s)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return failures.of_validation(error)

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        return failures.respond(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def _bug(_: Request, error: Exception) -> JSONResponse:
        return failures.respond(500, f"internal error: {type(error).__name__}")

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Complete text or token ids."""
        if (refusal := _refusal(service, body.model)) is not None:
            return refusal
        prompts = await asyncio.to_thread(_encoded, service, body)
        echo = [service.tokenizer.decode(ids) for ids in prompts] if body.echo else ()
        call = service.open(prompts, body.sampling, body.num_choices)
        answer = Answer(COMPLETION, service.model_name, call, len(prompts), echo)
        return await _send(answer, body, request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        if (refusal := _refusal(service, body.model)) is not None:
            return refusal
        messages = [message.plain() for message in body.messages]
        prompt = await asyncio.to_thread(service.tokenizer.chat, messages)
        call = service.open([prompt], body.sampling, body.num_choices)
        return await _send(Answer(CHAT, service.model_name, call, 1), body, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the one model served."""
        return {"object": "list", "data": [_model(service.model_name, created, context)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """Describe the model served."""
        if name != service.model_name:
            return _no_model(service, name)
        return JSONResponse(_model(name, created, context))

    @app.get("/health")
    async def health() -> Response:
        """Say whether the engine is running; never waits for it."""
        trouble = service.trouble
        if trouble is not None:
            return JSONResponse({"status": "unhealthy", "reason": trouble}, status_code=503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics under vLLM's names."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/timeline")
    async def timeline() -> dict[str, Any]:
        """The engine's recent steps and requests, as the file `toolkit timeline` reads."""
        return await asyncio.to_thread(_timeline, service)

    return app


def _encoded(service: Service, body: CompletionRequest) -> list[list[int]]:
    """Return each prompt's tokens. Raises UsageError for ids the model does not have."""
    vocab_size = service.vocab_size
    prompts = []
    for prompt in body.prompts():
        ids = service.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise UsageError(f"token id {wrong} is not in the vocabulary of {vocab_size}")
        prompts.append(ids)
    return prompts


class _EventStream(StreamingResponse):
    """Events of an answer. The call is left however sending ends, even before its first event."""

    def __init__(self, answer: Answer, *, include_usage: bool) -> None:
        events = answer.events(include_usage=include_usage)
        super().__init__(events, media_type="text/event-stream")
        self._call = answer.call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._call:
            await super().__call__(scope, receive, send)


async def _send(
    answer: Answer, body: ChatRequest | CompletionRequest, request: Request
) -> Response:
    if body.stream:
        return _EventStream(answer, include_usage=body.include_usage)
    async with answer.call:
        whole = asyncio.create_task(answer.whole())
        gone = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
            # Nobody reads what is sent to a client that has gone.
            return JSONResponse(whole.result()) if whole.done() else Response(status_code=499)
        finally:
            gone.cancel()
            whole.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refusal(service: Service, model: str) -> JSONResponse | None:
    """Return why no call is taken now, or None."""
    if model != service.model_name:
        return _no_model(service, model)
    if service.draining:
        return failures.respond(503, "the server is shutting down", code="draining")
    return None


def _timeline(service: Service) -> dict[str, Any]:
    body = files.to_json(service.engine.timeline(f"serving {service.model_name}"))
    return {
        "format": f"toolkit/{files.KIND}",
        "version": files.VERSION,
        "digest": record.digest(body),
        "provenance": record.provenance(),
        "body": body,
    }


def _no_model(service: Service, name: str) -> JSONResponse:
    message = f"the model {name!r} does not exist here; this server has {service.model_name!r}"
    return failures.respond(404, message, param="model", code="model_not_found")


def _model(name: str, created: int, context: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "toolkit",
        "max_model_len": context,
    }
