"""The application: routes joined, errors given OpenAI's shape, the service's life tied to it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import toolkit
from toolkit.errors import ToolkitError
from toolkit.serve.server import failures, generation, inspection
from toolkit.serve.server.gate import Gate
from toolkit.serve.server.request_log import RequestLog
from toolkit.serve.server.service import Service


@dataclass(frozen=True)
class Doorkeeping:
    """Who is let in: `api_keys` (none: everyone), and how large a body may be.

    Pages of `origins` ("*": of any) may ask from a browser. `log_requests`: a line for each.
    """

    api_keys: Sequence[str] = ()
    max_body_bytes: int = 8 * 2**20
    origins: Sequence[str] = ()
    log_requests: bool = False


def create(service: Service, door: Doorkeeping | None = None) -> FastAPI:
    """Return the application in front of `service`, which it starts and stops."""
    door = door or Doorkeeping()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="toolkit serve",
        version=toolkit.__version__,
        summary="An OpenAI-compatible API in front of one model.",
        lifespan=lifespan,
    )
    app.add_middleware(
        Gate,
        api_keys=door.api_keys,
        max_body_bytes=door.max_body_bytes,
        on_status=service.metrics.answered,
    )
    if door.log_requests:
        app.add_middleware(RequestLog, clock=service.engine.clock)
    if door.origins:
        # Outside the gate: a browser first asks without a key whether it may send one.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(door.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    app.include_router(generation.router(service))
    app.include_router(inspection.router(service))

    @app.exception_handler(ToolkitError)
    async def _ours(_: Request, error: ToolkitError) -> JSONResponse:
        return failures.of_toolkit(error, retry_after_s=service.retry_after_s)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return failures.of_validation(error)

    @app.exception_handler(RecursionError)
    async def _deep(_: Request, error: RecursionError) -> JSONResponse:
        return failures.respond(400, "the body is nested too deeply", code="json_invalid")

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        response = failures.respond(error.status_code, str(error.detail))
        # 405 names the methods there are.
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def _bug(_: Request, error: Exception) -> JSONResponse:
        return failures.respond(500, f"internal error: {type(error).__name__}")

    app.openapi = functools.partial(_description, app, service.model_name)  # type: ignore[method-assign]
    return app


def _description(app: FastAPI, model_name: str) -> dict[str, Any]:
    """Return the OpenAPI description, which names the one model there is to ask."""
    if app.openapi_schema is None:
        made = FastAPI.openapi(app)
        for schema in made["components"]["schemas"].values():
            asked = schema.get("properties", {}).get("model")
            if asked is not None and schema.get("additionalProperties") is False:
                asked |= {"examples": [model_name], "enum": [model_name]}
                asked.pop("anyOf", None)
    assert app.openapi_schema is not None
    return app.openapi_schema
