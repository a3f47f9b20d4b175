"""What every HTTP request passes: the API key, the size of its body, the count of its answer."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from toolkit.serve.server import failures

# Nothing here says anything about a caller or costs the engine anything.
_OPEN = frozenset({"/", "/health", "/stats", "/metrics", "/openapi.json", "/docs", "/redoc"})


class Gate:
    """Refuses with 401 what brings none of the keys, and with 413 what is too large."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: Sequence[str],
        max_body_bytes: int,
        on_status: Callable[[int], None],
    ) -> None:
        """`on_status` hears the status of every answer, refusals included."""
        self._app = app
        self._on_status = on_status
        self._digests = [_digest(key) for key in api_keys]
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._on_status(message["status"])
            await send(message)

        try:
            await self._pass(scope, receive, counted)
        except Exception:
            # Answered with 500 further out.
            self._on_status(500)
            raise

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if not self._admits(scope["path"], headers):
            refusal = failures.respond(401, "no valid API key was given", code="invalid_api_key")
            refusal.headers["WWW-Authenticate"] = "Bearer"
            await refusal(scope, receive, send)
            return
        declared = headers.get("content-length", "")
        body = b""
        more = scope["method"] not in ("GET", "HEAD")
        too_large = declared.isdigit() and int(declared) > self._max_body_bytes
        while more and not too_large:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            too_large = len(body) > self._max_body_bytes
        if too_large:
            limit = f"the body is larger than {self._max_body_bytes} bytes"
            await failures.respond(413, limit, code="body_too_large")(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    def _admits(self, path: str, headers: Headers) -> bool:
        if not self._digests or path in _OPEN:
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip())
        # All are compared, and digests at that: the time taken tells nothing about a key.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body that was read, then whatever comes after."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
