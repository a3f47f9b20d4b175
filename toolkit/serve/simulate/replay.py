"""A live engine recorded, and played back on virtual time: the decisions must be the same.

What is recorded is what the world decided: when requests joined, how long steps took, which tokens
the model drew. Everything else is decided again, by the same scheduler, policies and block pool.
Where the batches of the two agree, to the slice, the simulator decides as the live engine does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from toolkit.serve.batch import Batch, StepResult
from toolkit.serve.clock import Clock, VirtualClock
from toolkit.serve.engine import Engine, StepReport
from toolkit.serve.executor.base import Executor
from toolkit.serve.request import Request, SamplingParams
from toolkit.serve.scheduler import Scheduler

# A slice as plain data: request, phase, first position, position after the last.
Piece = tuple[str, str, int, int]


def pieces(batch: Batch) -> tuple[Piece, ...]:
    """Return a batch's slices as plain data, in order."""
    return tuple(
        (piece.request.id, piece.phase.value, piece.start, piece.end) for piece in batch.slices
    )


@dataclass(frozen=True)
class Joined:
    """A request that was given to the engine at `at_s`."""

    at_s: float
    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    arrival_s: float
    priority: int = 0
    cache_salt: str = ""

    def request(self) -> Request:
        """Return the request anew, as it was before anything was computed of it."""
        return Request(
            self.id,
            self.prompt_ids,
            self.sampling,
            arrival_s=self.arrival_s,
            priority=self.priority,
            cache_salt=self.cache_salt,
        )


@dataclass(frozen=True)
class Stepped:
    """A step: when it began and ended, what was in it, and the tokens drawn."""

    start_s: float
    end_s: float
    pieces: tuple[Piece, ...]
    token_ids: tuple[int | None, ...]


@dataclass
class Recording:
    """What happened to an engine, in order."""

    events: list[Joined | Stepped] = field(default_factory=list)

    @property
    def steps(self) -> list[Stepped]:
        """The steps alone."""
        return [event for event in self.events if isinstance(event, Stepped)]


class _Tap:
    """A clock that remembers what it last said."""

    def __init__(self, inner: Clock) -> None:
        self.inner = inner
        self.last_s = 0.0

    def now(self) -> float:
        self.last_s = self.inner.now()
        return self.last_s


class _Heard:
    """An executor that remembers its last batch and result."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self.last: tuple[tuple[Piece, ...], tuple[int | None, ...]] = ((), ())

    def start(self) -> None:
        self.inner.start()

    def run(self, batch: Batch) -> StepResult:
        found = pieces(batch)
        result = self.inner.run(batch)
        self.last = (found, result.token_ids)
        return result

    def successor(self) -> Executor:
        return _Heard(self.inner.successor())

    def close(self) -> None:
        self.inner.close()


class Recorder:
    """Stands before an undivided engine and writes down what passes."""

    def __init__(self, engine: Engine) -> None:
        """`engine` has nothing in it; from now on it is used through the recorder only."""
        self.engine = engine
        self.recording = Recording()
        self._clock = engine.clock = _Tap(engine.clock)
        self._executor = engine.executor = _Heard(engine.executor)

    def add(self, request: Request) -> None:
        """Give the engine a request."""
        self.engine.add(request)
        # Drawn tokens depend on the seed, and those are played back: it need not be kept.
        self.recording.events.append(
            Joined(
                self._clock.last_s,
                request.id,
                tuple(request.prompt_ids),
                replace(request.sampling),
                request.arrival_s,
                request.priority,
                request.cache_salt,
            )
        )

    def step(self) -> StepReport:
        """Make a step."""
        report = self.engine.step()
        self.recording.events.append(Stepped(report.start_s, report.end_s, *self._executor.last))
        return report


class _Playback:
    """An executor whose steps end when the recorded ones did, with their tokens."""

    def __init__(self, clock: VirtualClock, steps: list[Stepped]) -> None:
        self.clock = clock
        self.batches: list[tuple[Piece, ...]] = []
        self._steps = steps

    def start(self) -> None: ...

    def run(self, batch: Batch) -> StepResult:
        step = self._steps[len(self.batches)]
        self.batches.append(pieces(batch))
        self.clock.advance(step.end_s - self.clock.now())
        # Another batch draws at other places; the tokens are then of no use, and it will be seen.
        drawn = dict(zip((piece[0] for piece in step.pieces), step.token_ids, strict=True))
        return StepResult(
            tuple(
                (drawn.get(piece.request.id) or 0) if piece.samples else None
                for piece in batch.slices
            )
        )

    def successor(self) -> _Playback:
        return self

    def close(self) -> None: ...


def replay(
    recording: Recording,
    scheduler: Scheduler,
    *,
    make: Callable[[Scheduler, Executor, Clock], Engine] = Engine,
) -> list[tuple[Piece, ...]]:
    """Return the batches that `scheduler`, with nothing in it, makes of what was recorded.

    They equal those of `recording.steps` where it decides as the recorded engine did.
    """
    clock = VirtualClock()
    executor = _Playback(clock, recording.steps)
    engine = make(scheduler, executor, clock)
    for event in recording.events:
        at_s = event.at_s if isinstance(event, Joined) else event.start_s
        clock.advance(max(0.0, at_s - clock.now()))
        if isinstance(event, Joined):
            engine.add(event.request())
        else:
            engine.step()
    return executor.batches
