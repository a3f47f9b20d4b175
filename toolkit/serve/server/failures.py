"""Errors as OpenAI's clients expect them: a status and `{"error": {...}}`."""

from __future__ import annotations

from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from toolkit.errors import MissingExtraError, ToolkitError, UsageError
from toolkit.serve.queue import QueueFullError
from toolkit.serve.request import TooLongError
from toolkit.serve.worker import EngineDeadError

# Of a field that may be of several types: how pydantic names each, and how people do.
_KINDS = {
    "str": "a string",
    "list[int]": "a list of integers",
    "list[str]": "a list of strings",
    "list[list[int]]": "a list of lists of integers",
    "list[ContentPart]": "a list of content parts",
}
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> Any:
    """Return OpenAI's error object."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def respond(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> JSONResponse:
    """Return an error response."""
    return JSONResponse(body(status, message, param=param, code=code), status_code=status)


def no_model(asked: str | None, served: str) -> JSONResponse:
    """Return the response to a request for a model that is not served."""
    message = f"the model {asked!r} does not exist here; this server has {served!r}"
    return respond(404, message, param="model", code="model_not_found")


def of_toolkit(error: ToolkitError, *, retry_after_s: int = 1) -> JSONResponse:
    """Return the response to an error of ours: the client's fault, no room, or our own."""
    if isinstance(error, QueueFullError):
        response = respond(429, str(error), code="queue_full")
        response.headers["Retry-After"] = str(retry_after_s)
        return response
    if isinstance(error, TooLongError):
        # OpenAI's code: by it clients tell a prompt to shorten from one to correct.
        return respond(400, str(error), code="context_length_exceeded")
    if isinstance(error, UsageError):
        return respond(400, str(error))
    if isinstance(error, MissingExtraError):
        # What is not installed is not supported here; a 500 would be sent again and again.
        return respond(400, str(error), code="unsupported_parameter")
    if isinstance(error, EngineDeadError):
        return respond(503, str(error), code="engine_dead")
    return respond(500, str(error))


def of_validation(error: RequestValidationError) -> JSONResponse:
    """Return the response to a body that is not what the route takes: its first problem."""
    problems = error.errors()
    first = problems[0]
    context = first.get("ctx") or {}
    if first["type"] == "json_invalid":
        problem = f"the body is not valid JSON: {context.get('error', first['msg'])}"
        return respond(400, problem, code="json_invalid")
    location = [str(part) for part in first["loc"] if part != "body"]
    at = next((i for i, part in enumerate(first["loc"]) if part in _KINDS), None)
    if at is not None:
        # No type fits, and each has said so: what all of them are says more than the first's word.
        field = first["loc"][:at]
        tried = [p["loc"][at] for p in problems if p["loc"][:at] == field and len(p["loc"]) > at]
        kinds = [_KINDS[kind] for kind in dict.fromkeys(tried) if kind in _KINDS]
        name = ".".join(str(part) for part in field if part != "body")
        wanted = " or ".join(filter(None, (", ".join(kinds[:-1]), kinds[-1])))
        return respond(400, f"{name}: it should be {wanted}", param=name, code="invalid_type")
    param = context.get("field") or ".".join(location) or None
    message = first["msg"].removeprefix("Value error, ")
    if param and "field" not in context:
        message = f"{param}: {message}"
    return respond(400, message, param=param, code=first["type"])
