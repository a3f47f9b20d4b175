"""The engine in a thread of its own: requests go in, news of every step comes out."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from toolkit import log
from toolkit.errors import ToolkitError
from toolkit.serve.engine import Engine, StepReport, TextStream
from toolkit.serve.request import Request

logger = log.get_logger(__name__)


class EngineDeadError(ToolkitError):
    """The engine has stopped, so nothing it was given can be finished."""

    kind = "engine-dead"


@dataclass(frozen=True)
class Submission:
    """A request on its way to the engine."""

    request: Request
    stream: TextStream


class Worker:
    """Owns the engine from `start` to `stop`; every other thread speaks to it through here."""

    def __init__(
        self,
        engine: Engine,
        on_step: Callable[[StepReport], None],
        on_death: Callable[[EngineDeadError], None],
    ) -> None:
        """Both callbacks run in the engine's thread and must be quick."""
        self.engine = engine
        self._on_step = on_step
        self._on_death = on_death
        self._inbox: deque[Submission] = deque()
        self._aborts: deque[Request] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._busy_since: float | None = None
        self._error: EngineDeadError | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._error is None

    @property
    def busy_s(self) -> float:
        """How long the present step has been running, 0 between steps."""
        since = self._busy_since
        own_s = 0.0 if since is None else time.monotonic() - since
        # A divided engine's steps outlast each other: one may hang while the others go on.
        began_s = self.engine.in_flight_since_s
        return own_s if began_s is None else max(own_s, self.engine.clock.now() - began_s)

    @property
    def num_waiting(self) -> int:
        """Requests not yet started, those still on their way included."""
        return self.engine.scheduler.queue.num_requests + len(self._inbox)

    def submit(self, submissions: Sequence[Submission]) -> None:
        """Hand over requests, all or none.

        Raises UsageError (could never be served), QueueFullError (no room), EngineDeadError.
        """
        scheduler = self.engine.scheduler
        for submission in submissions:
            scheduler.validate(submission.request)
        with self._wake:
            if self._error is not None or self._stopping:
                raise self._error or EngineDeadError("the engine has been stopped")
            tokens = sum(len(submission.request.prompt_ids) for submission in submissions)
            coming = sum(len(submission.request.prompt_ids) for submission in self._inbox)
            scheduler.queue.check_room(
                len(submissions), tokens, num_coming=len(self._inbox), tokens_coming=coming
            )
            self._inbox.extend(submissions)
            self._wake.notify()

    def abort(self, requests: Sequence[Request]) -> None:
        """End requests whose client has gone; those already finished are left alone."""
        with self._wake:
            self._aborts.extend(requests)
            self._wake.notify()

    def abandon(self, error: EngineDeadError) -> None:
        """Give the engine up, hung as it may be: its thread ends if its step ever does."""
        with self._wake:
            self._error = self._error or error
            self._stopping = True
            self._wake.notify()

    def stop(self, timeout_s: float = 30.0) -> None:
        """End the thread after its present step, whatever is still open, and free the cache."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            # One that was given up may never end.
            self._thread.join(timeout_s if self._error is None else 1.0)

    def _run(self) -> None:
        try:
            self.engine.executor.start()
            while self._receive():
                self._busy_since = time.monotonic()
                report = self.engine.step()
                self._busy_since = None
                if self._error is not None:
                    return
                self._on_step(report)
        except Exception as error:
            # Whatever it was, the engine's state cannot be trusted: say so to everyone waiting.
            logger.exception("the engine has died")
            dead = EngineDeadError(f"the engine has died: {type(error).__name__}: {error}")
            with self._wake:
                abandoned = self._error is not None
                self._error = self._error or dead
            if not abandoned:
                self._on_death(dead)
        finally:
            self._busy_since = None
            self.engine.executor.close()

    def _receive(self) -> bool:
        """Take in arrivals and aborts, waiting while there is nothing to do; False to stop."""
        while True:
            with self._wake:
                self._wake.wait_for(
                    lambda: self._stopping or self._inbox or self._aborts or self.engine.has_work
                )
                if self._stopping:
                    return False
                arrivals, self._inbox = self._inbox, deque()
                aborts, self._aborts = self._aborts, deque()
            for submission in arrivals:
                self.engine.add(submission.request, submission.stream)
            for request in aborts:
                self.engine.abort(request)
            if self.engine.has_work:
                return True
