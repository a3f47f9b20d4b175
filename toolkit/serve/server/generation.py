"""The routes that use the model: completions, chat, embeddings."""

from __future__ import annotations

import asyncio
import base64
import math
from array import array
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from toolkit.errors import UsageError
from toolkit.serve.programs.identity import identify
from toolkit.serve.request import SamplingParams
from toolkit.serve.server import failures
from toolkit.serve.server.chat import ChatRequest
from toolkit.serve.server.documents import Completed, Embeddings, errors, stream
from toolkit.serve.server.logprobs import Writer
from toolkit.serve.server.protocol import Body, CompletionRequest
from toolkit.serve.server.responses import CHAT, COMPLETION, Answer, Choice, Shape
from toolkit.serve.server.service import Ask, Call, Service
from toolkit.serve.server.texts import EmbeddingRequest
from toolkit.serve.server.tool_calls import FORMATS, ArgumentsReader, CallReader, ListReader

_ERRORS = errors(400, 401, 404, 413, 429, 500, 503)


def router(service: Service) -> APIRouter:
    """Return the routes in front of `service`."""
    routes = APIRouter(responses=_ERRORS)

    @routes.post("/v1/completions", responses=stream(Completed))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Complete text or token ids."""
        if (refusal := _refusal(service, body.model)) is not None:
            return refusal
        prompts = await asyncio.to_thread(_encoded, service, body.prompts())
        echo = [service.tokenizer.decode(ids) if body.echo else None for ids in prompts]
        shown = body.limit() != 0

        def choice(index: int) -> Choice:
            writer = Writer(service.tokenizer, chat=False)
            return Choice(index, writer, echo=echo[index // body.num_choices], shows_output=shown)

        call = await _open(service, request, _ask(body, prompts, COMPLETION, request))
        answer = Answer(COMPLETION, service.model_name, call, choice, shown)
        return await _send(answer, body, request)

    @routes.post("/v1/chat/completions", responses=stream(Completed))
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        if (refusal := _refusal(service, body.model)) is not None:
            return refusal
        prompt = await asyncio.to_thread(
            service.tokenizer.chat,
            [message.plain() for message in body.messages],
            tools=[tool.model_dump(exclude_none=True) for tool in body.offered],
            settings=body.chat_template_kwargs,
        )

        def choice(index: int) -> Choice:
            writer = Writer(service.tokenizer, chat=True)
            return Choice(index, writer, reader=_reader(service, body))

        call = await _open(service, request, _ask(body, [prompt], CHAT, request))
        return await _send(Answer(CHAT, service.model_name, call, choice), body, request)

    @routes.post("/v1/embeddings", response_model=Embeddings)
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Embed texts: the mean of the last hidden states over a text's tokens, of unit length."""
        if (refusal := _refusal(service, body.model)) is not None:
            return refusal
        prompts = await asyncio.to_thread(_encoded, service, body.inputs())
        once = SamplingParams(max_tokens=1)
        ask = Ask(prompts, lambda _: once, pooled=True, prefix="embd")
        call = await _open(service, request, ask)
        async with call:
            vectors: list[list[float]] = [[] for _ in prompts]
            gone = asyncio.create_task(_disconnected(request))
            try:
                async for index, output in call:
                    vectors[index] = _unit(output.hidden_mean)
                    if gone.done():
                        return Response(status_code=499)
            finally:
                gone.cancel()
        return JSONResponse(_embedded(service, body, prompts, vectors))

    return routes


def _ask(body: Body, prompts: Sequence[Sequence[int]], shape: Shape, request: Request) -> Ask:
    return Ask(
        prompts,
        body.sampling,
        body.num_choices,
        body.priority or 0,
        body.cache_salt or "",
        prefix=shape.prefix,
        identity=identify(request.headers, body.said),
    )


async def _open(service: Service, request: Request, ask: Ask) -> Call:
    """Submit what is asked for, and leave it with the HTTP request for its log."""
    call: Call = await service.open(ask)
    request.state.call = call
    return call


def _encoded(service: Service, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    """Return each prompt's tokens. Raises UsageError for ids the model does not have."""
    vocab_size = service.vocab_size
    encoded = []
    for prompt in prompts:
        ids = service.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise UsageError(f"token id {wrong} is not in the vocabulary of {vocab_size}")
        encoded.append(ids)
    return encoded


def _reader(service: Service, body: ChatRequest) -> CallReader | None:
    """Return what finds tool calls in the answer to `body`, or None where there can be none."""
    if body.forced:
        return ArgumentsReader(body.forced)
    if body.forced == "":
        return ListReader()
    return FORMATS[service.tool_format]() if body.offered else None


class _EventStream(StreamingResponse):
    """Events of an answer. The call is left however sending ends, even before its first event."""

    def __init__(self, answer: Answer, body: Body) -> None:
        continuous = body.stream_options is not None and body.stream_options.continuous_usage_stats
        events = answer.events(include_usage=body.include_usage, continuous_usage=continuous)
        super().__init__(events, media_type="text/event-stream")
        self._call = answer.call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._call:
            await super().__call__(scope, receive, send)


async def _send(answer: Answer, body: Body, request: Request) -> Response:
    if body.stream:
        return _EventStream(answer, body)
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
        return failures.no_model(model, service.model_name)
    if service.draining:
        return failures.respond(503, "the server is shutting down", code="draining")
    return None


def _unit(vector: Sequence[float]) -> list[float]:
    length = math.sqrt(sum(value * value for value in vector)) or 1.0
    return [value / length for value in vector]


def _embedded(
    service: Service,
    body: EmbeddingRequest,
    prompts: Sequence[Sequence[int]],
    vectors: Sequence[Sequence[float]],
) -> dict[str, Any]:
    if body.dimensions not in (None, len(vectors[0])):
        raise UsageError(
            f"{body.dimensions} dimensions were asked for and the model has {len(vectors[0])}",
            remedy="leave dimensions out",
        )
    data: list[dict[str, Any]] = []
    for index, vector in enumerate(vectors):
        told: Any = vector
        if body.encoding_format == "base64":
            told = base64.b64encode(array("f", vector).tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": told})
    num_tokens = sum(map(len, prompts))
    return {
        "object": "list",
        "model": service.model_name,
        "data": data,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
