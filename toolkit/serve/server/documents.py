"""What the OpenAPI page promises of the answers: their shape, and which errors there are."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class ErrorBody(BaseModel):
    """What is wrong, as OpenAI says it."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """Every error of this server."""

    error: ErrorBody


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None


class Completed(BaseModel):
    """A completion; choices as in OpenAI's API."""

    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Usage


class Embedding(BaseModel):
    """One input's vector, as numbers or as base64 of little-endian float32."""

    object: str
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Token counts of inputs."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """Vectors, in the order of the inputs."""

    object: str
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class Tokens(BaseModel):
    """Token ids."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Prompt(BaseModel):
    """The text of token ids."""

    prompt: str


class Model(BaseModel):
    """A model served."""

    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int


class Models(BaseModel):
    """The models served: one."""

    object: str
    data: list[Model]


class Health(BaseModel):
    """Whether requests can be served."""

    status: str
    reason: str | None = None


_TEXTS = {
    400: "The request is malformed, or can never be served.",
    401: "No valid API key.",
    404: "No such model, or no such page.",
    413: "The body is too large.",
    429: "Too many wait; Retry-After says when to come back.",
    500: "A fault of the server's.",
    503: "The server is shutting down, or its engine is.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of the errors a route may answer with."""
    return {status: {"model": Error, "description": _TEXTS[status]} for status in statuses}


def stream(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Return the description of an answer that comes whole, or as events with `stream`."""
    return {200: {"model": model, "content": {"text/event-stream": {"schema": {"type": "string"}}}}}
