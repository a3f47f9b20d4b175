"""What writes the answers: anything that streams text, an OpenAI-compatible URL among them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from toolkit.errors import ToolkitError, UsageError, require

if TYPE_CHECKING:
    import httpx

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


class Generator(Protocol):
    """A chat model that streams. Decoding is greedy, so that an answer can be asked for again."""

    def stream(self, messages: Sequence[Message], *, max_tokens: int = 256) -> Iterator[str]:
        """Yield the reply in pieces as they are generated."""
        ...


class EndpointError(ToolkitError):
    """A model server could not be reached, refused, or stopped in the middle."""

    kind = "endpoint"


class OpenAIGenerator:
    """A model behind an OpenAI-compatible `/v1/chat/completions`, streamed as server-sent events.

    >>> OpenAIGenerator("http://localhost:8000", model="m").url
    'http://localhost:8000/v1'
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        connect_timeout_s: float = 5.0,
        read_timeout_s: float = 120.0,
    ) -> None:
        """`model` None takes the first that the server lists; `api_key` None reads OPENAI_API_KEY.

        `read_timeout_s` is the longest silence allowed, before the first token or between two.
        """
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"{url!r} is no URL", remedy="write http://HOST:PORT")
        url = url.rstrip("/").removesuffix("/chat/completions")
        self.url = url if url.rsplit("/", 1)[-1] == "v1" else f"{url}/v1"
        self.model = model
        self._api_key = os.environ.get("OPENAI_API_KEY") if api_key is None else api_key
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s

    def stream(self, messages: Sequence[Message], *, max_tokens: int = 256) -> Iterator[str]:
        """Yield the reply in pieces. Raises EndpointError saying what the server did."""
        httpx = require("httpx", extra="rag")
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        timeout = httpx.Timeout(self._read_timeout_s, connect=self._connect_timeout_s)
        try:
            with httpx.Client(headers=headers, timeout=timeout) as client:
                if self.model is None:
                    self.model = self._first_model(client)
                body = {
                    "model": self.model,
                    "messages": [dict(message) for message in messages],
                    "max_tokens": max_tokens,
                    "temperature": 0,
                    "stream": True,
                }
                with client.stream("POST", f"{self.url}/chat/completions", json=body) as reply:
                    self._raise_for_status(reply)
                    yield from self._deltas(reply)
        except httpx.ConnectTimeout as error:
            raise self._unreachable(f"within {self._connect_timeout_s:g} s") from error
        except httpx.TimeoutException as error:
            raise EndpointError(
                f"{self.url} was silent for {self._read_timeout_s:g} s",
                remedy="it may be overloaded: try again, or allow more with --timeout",
            ) from error
        except httpx.ConnectError as error:
            raise self._unreachable(f"({error})") from error
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise EndpointError(f"the connection to {self.url} broke: {error}") from error

    def _first_model(self, client: httpx.Client) -> str:
        reply = client.get(f"{self.url}/models")
        self._raise_for_status(reply)
        try:
            return str(reply.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise EndpointError(
                f"{self.url}/models lists no model", remedy="name one with --model"
            ) from error

    def _deltas(self, reply: httpx.Response) -> Iterator[str]:
        """Yield the text of each event; a stream that does not say it ended was cut."""
        num_events, ended = 0, False
        for line in reply.iter_lines():
            field, _, value = line.partition(":")
            if field != "data":
                continue  # comments keep a connection alive; event names are not used
            value = value.strip()
            if value == "[DONE]":
                return
            event = self._event(value)
            num_events += 1
            # The last chunk of some servers carries usage and no choice.
            for choice in event.get("choices") or []:
                if choice.get("finish_reason"):
                    ended = True
                text = (choice.get("delta") or {}).get("content")
                if text:
                    yield text
        if not ended:
            raise EndpointError(
                f"{self.url} cut its reply short after {num_events} events", remedy="ask again"
            )

    def _event(self, value: str) -> dict[str, Any]:
        try:
            event = json.loads(value)
        except json.JSONDecodeError as error:
            raise EndpointError(f"{self.url} sent an event that is not JSON: {value!r}") from error
        if not isinstance(event, dict):
            raise EndpointError(f"{self.url} sent an event that is no object: {value!r}")
        if "error" in event:
            raise EndpointError(f"{self.url} failed while replying: {_reason(event)}")
        return event

    def _raise_for_status(self, reply: httpx.Response) -> None:
        if reply.is_success:
            return
        reply.read()
        try:
            said = _reason(reply.json())
        except ValueError:
            said = reply.text.strip()[:200]
        remedies = {
            401: "set OPENAI_API_KEY",
            403: "set OPENAI_API_KEY to a key that may use this model",
            404: "check the URL and the model's name",
            429: "it is busy: try again later",
            503: "it is busy or starting: try again later",
        }
        raise EndpointError(
            f"{self.url} answered {reply.status_code} {reply.reason_phrase}"
            + (f": {said}" if said else ""),
            remedy=remedies.get(reply.status_code),
        )

    def _unreachable(self, how: str) -> EndpointError:
        return EndpointError(
            f"no model server answers at {self.url} {how}",
            remedy="start one (toolkit serve run MODEL), check the URL, or leave out --url",
        )


def _reason(body: Any) -> str:
    """Return the message in an error body; servers nest it differently."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return str(error)[:200]
