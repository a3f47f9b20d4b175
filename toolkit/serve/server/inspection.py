"""The routes that do not use the model: what is served, how it fares, tokens and their texts."""

from __future__ import annotations

import asyncio
import html
import time
from importlib import resources
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from toolkit.errors import UsageError
from toolkit.serve.server import failures
from toolkit.serve.server.documents import Health, Model, Models, Prompt, Tokens, errors
from toolkit.serve.server.service import Service
from toolkit.serve.server.texts import DetokenizeRequest, TokenizeRequest
from toolkit.serve.server.windows import Form, answer


def router(service: Service) -> APIRouter:
    """Return the routes that look at `service`."""
    routes = APIRouter()
    created = int(time.time())
    context = service.engine.scheduler.config.max_context
    page = resources.files("toolkit.serve.server").joinpath("live.html").read_text("utf-8")

    @routes.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def live() -> str:
        """The live page."""
        return page.replace("{{model}}", html.escape(service.model_name))

    @routes.get("/stats")
    async def stats() -> dict[str, Any]:
        """What the live page draws: the last five minutes, by second."""
        engine = service.engine
        now_s = engine.clock.now()
        split = service.split_live.body(now_s, engine)
        return service.live.body(now_s, engine.scheduler) | {"split": split}

    @routes.get("/v1/models", response_model=Models, responses=errors(401))
    async def models() -> dict[str, Any]:
        """List the one model served."""
        return {"object": "list", "data": [_model(service.model_name, created, context)]}

    @routes.get("/v1/models/{name:path}", response_model=Model, responses=errors(401, 404))
    async def model(name: str) -> Response:
        """Describe the model served."""
        if name != service.model_name:
            return failures.no_model(name, service.model_name)
        return JSONResponse(_model(name, created, context))

    @routes.get("/v1/programs", responses=errors(401))
    async def programs() -> dict[str, Any]:
        """List the open programs: what each was given, how long it waited, what it is doing."""
        engine = service.engine
        rows = engine.scheduler.programs.rows(engine.clock.now())
        return {"object": "list", "data": rows}

    @routes.post("/tokenize", response_model=Tokens, responses=errors(400, 401, 404, 413))
    async def tokenize(body: TokenizeRequest) -> Response:
        """Return the tokens of a text or a conversation."""
        if body.model not in (None, service.model_name):
            return failures.no_model(body.model, service.model_name)
        ids = await asyncio.to_thread(_tokens, service, body)
        told: dict[str, Any] = {"count": len(ids), "max_model_len": context, "tokens": ids}
        texts = (service.tokenizer.token_bytes(token).decode(errors="replace") for token in ids)
        told["token_strs"] = list(texts) if body.return_token_strs else None
        return JSONResponse(told)

    @routes.post("/detokenize", response_model=Prompt, responses=errors(400, 401, 404, 413))
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Return the text of tokens."""
        if body.model not in (None, service.model_name):
            return failures.no_model(body.model, service.model_name)
        wrong = next((token for token in body.tokens if not 0 <= token < service.vocab_size), None)
        if wrong is not None:
            raise UsageError(f"token id {wrong} is not in the vocabulary of {service.vocab_size}")
        text = service.tokenizer.decode(body.tokens, skip_special_tokens=False)
        return JSONResponse({"prompt": text})

    unhealthy: dict[int | str, dict[str, Any]] = {503: {"model": Health}}

    @routes.get("/health", response_model=Health, responses=unhealthy)
    async def health() -> Response:
        """Say whether the engine is running; never waits for it."""
        trouble = service.trouble
        if trouble is not None:
            return JSONResponse({"status": "unhealthy", "reason": trouble}, status_code=503)
        return JSONResponse({"status": "ok"})

    plain: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}

    @routes.get("/metrics", response_class=Response, responses=plain)
    async def metrics() -> Response:
        """Prometheus metrics under vLLM's names."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/timeline", responses=errors(400, 401))
    async def timeline(
        form: Form = "record", since_s: float | None = None, until_s: float | None = None
    ) -> Response:
        """The engine's recent steps and requests, or those of a window.

        As the file `toolkit timeline` reads, as a page by itself, or as a trace for Perfetto. Times
        are the engine's (`now_s` of /stats); those below 0 count back from now.
        """
        title = f"serving {service.model_name}"
        return await asyncio.to_thread(answer, service.engine, title, form, since_s, until_s)

    return routes


def _tokens(service: Service, body: TokenizeRequest) -> list[int]:
    tokenizer = service.tokenizer
    if body.prompt is not None:
        return tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
    return tokenizer.chat(
        [message.plain() for message in body.messages or ()],
        tools=[tool.model_dump(exclude_none=True) for tool in body.tools or ()],
        add_generation_prompt=body.add_generation_prompt,
        settings=body.chat_template_kwargs,
    )


def _model(name: str, created: int, context: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "toolkit",
        "max_model_len": context,
    }
