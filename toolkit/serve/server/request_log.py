"""One line in the log for every request that asks for something, when it has been answered."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from toolkit import log
from toolkit.serve.clock import Clock
from toolkit.serve.server.service import Call

logger = log.get_logger(__name__)


class RequestLog:
    """Logs every POST; what only looks (health, metrics) would drown it. No text is logged."""

    def __init__(self, app: ASGIApp, *, clock: Clock) -> None:
        """`clock` is the engine's."""
        self._app = app
        self._clock = clock
        # Whoever asked for these lines wants them without --verbose, too.
        logger.setLevel("INFO")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        arrival_s, state = self._clock.now(), scope.setdefault("state", {})
        # nginx's number for a client that left before it was answered.
        status = 499

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            # Answered further out, where nothing has been sent yet.
            status = 500 if status == 499 else status
            raise
        finally:
            self._write(scope["path"], status, state.get("call"), arrival_s)

    def _write(self, path: str, status: int, call: Call | None, arrival_s: float) -> None:
        def since(time_s: float) -> float:
            return round((time_s - arrival_s) * 1000, 1)

        told: dict[str, object] = {"id": None, "endpoint": path, "status": status}
        if call is not None:
            drawn = [request for request in call.requests if not request.pooled]
            firsts_s = [time_s for r in drawn if (time_s := r.first_token_s) is not None]
            ends = {r.finish_reason.value if r.finish_reason else "open" for r in call.requests}
            told |= {
                "id": call.id,
                "prompt_tokens": sum(len(request.prompt_ids) for request in call.firsts),
                "output_tokens": sum(len(request.output_ids) for request in drawn),
                "finish": ",".join(sorted(ends)),
                "ttft_ms": since(min(firsts_s)) if firsts_s else None,
            }
        log.event(logger, "request", **told, total_ms=since(self._clock.now()))
