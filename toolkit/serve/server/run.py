"""Run the server on a socket, say when it is ready, drain it on SIGTERM or when it is lost."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from toolkit.errors import ToolkitError, UsageError
from toolkit.serve.server import app
from toolkit.serve.server.service import Service


class Server(uvicorn.Server):
    """The application under uvicorn: says when it is ready, and drains before it stops."""

    def __init__(
        self,
        service: Service,
        *,
        drain_s: float = 30.0,
        on_ready: Callable[[], None] | None = None,
        door: app.Doorkeeping | None = None,
    ) -> None:
        """`drain_s` is what open requests get to finish after SIGTERM or SIGINT."""
        config = uvicorn.Config(
            app.create(service, door),
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=max(1, round(drain_s)),
        )
        super().__init__(config)
        self._service = service
        service.on_lost = self._leave
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._on_ready is not None:
            self._on_ready()

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to end. Raises EngineDeadError where no engine stays up."""
        super().run(sockets)
        if self._service.lost is not None:
            raise self._service.lost

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGINT and self.should_exit:
            # Asked twice: at once. Other processes of ours end with their pipes.
            os._exit(128 + sig)
        # What runs is finished, what comes on open connections is refused, new ones are not made.
        self._service.draining = True
        super().handle_exit(sig, frame)

    def _leave(self) -> None:
        # Whoever waits has been told why; a supervisor starts another process.
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one. Raises UsageError or ToolkitError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OverflowError as error:
        raise UsageError(f"{port} is not a port number") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"port {port} of {host} is in use", remedy="choose another, or 0 for a free one"
            ) from error
        raise ToolkitError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
