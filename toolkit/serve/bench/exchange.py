"""One POST and its streamed answer, with as little work for each piece as there can be.

A load's client often shares the machine with what it measures: all that happens when a piece comes
is that it is kept with its time. Every request has a connection of its own; no proxies, no
redirects.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httptools

Found = TypeVar("Found")


@dataclass
class Reply:
    """An HTTP answer as it came: its status, 0 before there is one, and (perf_counter, bytes)."""

    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)

    def events(self) -> Iterator[tuple[float, Any]]:
        """Yield a stream's server-sent events, decoded, each when its line was complete.

        Raises ValueError where one is no JSON.
        """
        rest = b""
        for at_s, piece in self.pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                data = line.strip().removeprefix(b"data:").strip()
                if line.startswith(b"data:") and data != b"[DONE]":
                    yield at_s, json.loads(data)


async def post(
    url: str, headers: Mapping[str, str], body: Mapping[str, Any], *, timeout_s: float
) -> Reply:
    """Send `body` as JSON and wait for the whole answer, `timeout_s` at most.

    Raises OSError (no connection, or lost), asyncio.TimeoutError, or httptools.HttpParserError.
    """
    parts = urlsplit(url)
    content = json.dumps(body).encode()
    own = {"Host": parts.netloc, "Connection": "close", "Content-Type": "application/json"}
    lines = {**own, "Content-Length": str(len(content)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    request = f"POST {parts.path} HTTP/1.1\r\n{head}\r\n".encode() + content
    secure = ssl.create_default_context() if parts.scheme == "https" else None
    return await asyncio.wait_for(
        _exchanged(parts.hostname or "", parts.port or (443 if secure else 80), secure, request),
        timeout_s,
    )


async def _exchanged(host: str, port: int, secure: ssl.SSLContext | None, request: bytes) -> Reply:
    loop = asyncio.get_running_loop()
    transport, exchange = await loop.create_connection(
        lambda: _Exchange(loop, request), host, port, ssl=secure
    )
    try:
        return await exchange.done
    finally:
        transport.abort()


class _Exchange(asyncio.Protocol):
    """One connection: sends the request, keeps what comes; `done` when the answer is whole."""

    def __init__(self, loop: asyncio.AbstractEventLoop, request: bytes) -> None:
        self.done: asyncio.Future[Reply] = loop.create_future()
        self._request, self._reply, self._now_s = request, Reply(), 0.0
        self._says_its_length = False
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._now_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(error)

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is None and self._reply.status and not self._says_its_length:
            # As HTTP/1.0 does it: the end of the connection is the end of the answer.
            self.on_message_complete()
        self._end(exc or ConnectionResetError("the connection was closed within the answer"))

    # The parser calls these.

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._says_its_length = True

    def on_headers_complete(self) -> None:
        self._reply.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._reply.pieces.append((self._now_s, body))

    def on_message_complete(self) -> None:
        if not self.done.done():
            self.done.set_result(self._reply)

    def _end(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


def on_a_loop(main: Coroutine[Any, Any, Found]) -> Found:
    """Run `main` to its end on uvloop, or where there is none on asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    found: Found = uvloop.run(main)
    return found
