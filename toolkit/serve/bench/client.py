"""Sends a load to a URL and notes when every piece of every answer came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httptools
import httpx

from toolkit.errors import ToolkitError
from toolkit.serve.bench.exchange import Reply, post
from toolkit.serve.bench.load import Arrival
from toolkit.serve.bench.sample import Sample

# What is asked once to learn how many characters a token has.
_PROBE = "The sea is everything. It covers seven tenths of the terrestrial globe. " * 8


# What is asked to be completed: text, or token ids (completions only).
Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Target:
    """Where and how: an OpenAI base URL (ending in /v1), a model, completions or chat.

    `timeout_s` is what a whole request may take; `extra` are further fields of every body, for
    what only this server understands.
    """

    url: str
    model: str
    chat: bool = False
    api_key: str | None = None
    ignore_eos: bool = True
    timeout_s: float = 600.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def body(self, prompt: Prompt, max_tokens: int) -> dict[str, Any]:
        """Return the request's body; `ignore_eos` is beyond OpenAI and forces the length."""
        asked: dict[str, Any] = {"prompt": prompt}
        if self.chat:
            asked = {"messages": [{"role": "user", "content": prompt}]}
        forced = {"ignore_eos": True} if self.ignore_eos else {}
        own = {"model": self.model, "max_tokens": max_tokens, "temperature": 0}
        return {**own, **asked, **forced, **self.extra}

    @property
    def path(self) -> str:
        return "/chat/completions" if self.chat else "/completions"

    @property
    def headers(self) -> dict[str, str]:
        return _authorised(self.api_key)


@dataclass
class Record:
    """A streamed answer: text, when each piece of it came (perf_counter), usage, or an error."""

    text: str = ""
    piece_s: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def probe(target: Target) -> float:
    """Return how many characters a token of the target's model has. Raises ToolkitError."""
    url, body = target.url + target.path, target.body(_PROBE, 1)
    try:
        answer = httpx.post(url, json=body, headers=target.headers, timeout=target.timeout_s)
    except httpx.HTTPError as error:
        raise ToolkitError(
            f"{target.url} does not answer: {type(error).__name__} {error}",
            remedy="start the server first, and give its URL up to /v1",
        ) from error
    if answer.status_code != 200:
        raise ToolkitError(f"{target.url} answers {answer.status_code}: {answer.text[:300]}")
    return len(_PROBE) / int(answer.json()["usage"]["prompt_tokens"])


async def run(
    target: Target,
    arrivals: Sequence[Arrival],
    prompts: Sequence[Prompt],
    *,
    on_done: Callable[[], None] = lambda: None,
) -> list[Sample]:
    """Send every request at its time, whatever has become of the others; return what came."""
    start_s = time.perf_counter()

    async def one(arrival: Arrival, prompt: Prompt) -> tuple[float, Reply | str, float]:
        await asyncio.sleep(start_s + arrival.at_s - time.perf_counter())
        sent_s = time.perf_counter()
        reply = await _answered(target, target.body(prompt, arrival.output_tokens))
        end_s = time.perf_counter()
        on_done()
        return sent_s, reply, end_s

    pairs = list(zip(arrivals, prompts, strict=True))
    came = await asyncio.gather(*(one(*pair) for pair in pairs))
    # Read only now: while the load runs, the machine is for whoever serves it.
    samples = []
    for arrival, (sent_s, reply, end_s) in zip(arrivals, came, strict=True):
        record = _heard(reply)
        samples.append(
            Sample(
                arrival,
                sent_s - start_s,
                end_s - start_s,
                tuple(at - start_s for at in record.piece_s),
                record.usage.get("prompt_tokens", 0),
                record.usage.get("completion_tokens", len(record.piece_s)),
                record.error,
            )
        )
    return samples


async def ask(target: Target, body: Mapping[str, Any]) -> Record:
    """Send one request and return its streamed answer; whatever goes wrong is its `error`."""
    return _heard(await _answered(target, body))


async def _answered(target: Target, body: Mapping[str, Any]) -> Reply | str:
    """Return what came, or the name of what went wrong."""
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    url = target.url + target.path
    try:
        return await post(url, target.headers, {**body, **streamed}, timeout_s=target.timeout_s)
    except (OSError, asyncio.TimeoutError, httptools.HttpParserError) as error:
        return type(error).__name__


def _heard(reply: Reply | str) -> Record:
    record = Record()
    if isinstance(reply, str):
        record.error = reply
    elif reply.status != 200:
        record.error = f"HTTP {reply.status}"
    else:
        try:
            for at_s, event in reply.events():
                _hear(event, at_s, record)
        except ValueError as error:
            record.error = type(error).__name__
        if record.error is None and not record.piece_s:
            record.error = "nothing came"
    return record


def _hear(event: dict[str, Any], at_s: float, record: Record) -> None:
    if "error" in event:
        record.error = str(event["error"].get("code") or event["error"].get("message"))
    record.usage = event.get("usage") or record.usage
    for choice in event.get("choices", ()):
        if piece := choice.get("text") or (choice.get("delta") or {}).get("content"):
            record.text += piece
            record.piece_s.append(at_s)


def first_model(url: str, api_key: str | None) -> str:
    """Return the first model a server lists. Raises ToolkitError."""
    try:
        answer = httpx.get(f"{url}/models", headers=_authorised(api_key), timeout=30)
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise ToolkitError(
            f"{url} lists no model: {type(error).__name__} {error}",
            remedy="start the server first, give its URL up to /v1, or name the model",
        ) from error


def _authorised(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}
