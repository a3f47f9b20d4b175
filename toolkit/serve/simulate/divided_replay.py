"""A live run of a divided engine recorded, and decided again on the recorded times.

As `replay.py`, and what a divided engine decides beside its batches must be the same too: on how
many units each step begins, and so every layout, chunk and mode, because the controller here starts
from nothing and learns from the recorded durations what the live one learnt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from toolkit.hardware.share import Share
from toolkit.serve.batch import Batch, StepResult
from toolkit.serve.clock import Clock
from toolkit.serve.engine import StepReport
from toolkit.serve.request import Request
from toolkit.serve.simulate.replay import Joined, Piece, pieces
from toolkit.serve.split.engine import ConcurrentExecutor, DividedEngine

# A step as it begins: its slices, and the units it has.
Begun = tuple[tuple[Piece, ...], int]


@dataclass(frozen=True)
class Turn:
    """One call of `step`: what began at `launch_s`, and what ended at `end_s` with which tokens."""

    launch_s: float
    end_s: float
    begun: tuple[Begun, ...]
    ended: tuple[Piece, ...]
    token_ids: tuple[int | None, ...]


@dataclass
class DividedRecording:
    """What happened to a divided engine, in order."""

    events: list[Joined | Turn] = field(default_factory=list)

    @property
    def turns(self) -> list[Turn]:
        """The steps alone."""
        return [event for event in self.events if isinstance(event, Turn)]


class _Tap:
    """A clock that remembers what it said."""

    def __init__(self, inner: Clock) -> None:
        self.inner, self.told = inner, list[float]()

    def now(self) -> float:
        self.told.append(self.inner.now())
        return self.told[-1]


class _Heard:
    """An executor that remembers what it was given and gave back."""

    def __init__(self, inner: ConcurrentExecutor) -> None:
        self.inner, self.begun = inner, list[Begun]()
        self.ended: tuple[tuple[Piece, ...], tuple[int | None, ...]] = ((), ())

    def start(self) -> None:
        self.inner.start()

    def begin(self, batch: Batch, share: Share) -> None:
        # Before it can end: its requests' progress is then another.
        self.begun.append((pieces(batch), share.units))
        self.inner.begin(batch, share)

    def wait(self) -> tuple[Batch, StepResult]:
        batch, result = self.inner.wait()
        self.ended = (pieces(batch), result.token_ids)
        return batch, result

    def run(self, batch: Batch) -> StepResult:
        return self.inner.run(batch)

    def successor(self) -> ConcurrentExecutor:
        return self.inner.successor()

    def close(self) -> None:
        self.inner.close()


class DividedRecorder:
    """Stands before a divided engine and writes down what passes.

    Used from one thread, and nobody else asks the engine's clock for the time.
    """

    def __init__(self, engine: DividedEngine) -> None:
        """`engine` and its controller have seen nothing yet."""
        self.engine, self.recording = engine, DividedRecording()
        self._clock = engine.clock = _Tap(engine.clock)
        self._executor = engine.executor = _Heard(engine.executor)

    def add(self, request: Request) -> None:
        """Give the engine a request."""
        self.engine.add(request)
        self.recording.events.append(
            Joined(
                self._clock.told[-1],
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
        self._clock.told.clear()
        self._executor.begun.clear()
        report = self.engine.step()
        begun = tuple(self._executor.begun)
        turn = Turn(self._clock.told[0], report.end_s, begun, *self._executor.ended)
        self.recording.events.append(turn)
        return report


class _Script:
    """A clock that says what it is told to, and the last of it for ever."""

    def __init__(self) -> None:
        self.times: deque[float] = deque([0.0])

    def now(self) -> float:
        return self.times.popleft() if len(self.times) > 1 else self.times[0]


class DivergedError(AssertionError):
    """What ended in the recording was never begun in the replay."""


class _Playback:
    """An executor whose steps end in the recorded order, with the recorded tokens."""

    def __init__(self) -> None:
        self.begun: list[Begun] = []
        self.turn: Turn | None = None
        self._flying: list[Batch] = []

    def start(self) -> None: ...

    def begin(self, batch: Batch, share: Share) -> None:
        self.begun.append((pieces(batch), share.units))
        self._flying.append(batch)

    def wait(self) -> tuple[Batch, StepResult]:
        turn = self.turn
        assert turn is not None
        for batch in self._flying:
            if pieces(batch) == turn.ended:
                self._flying.remove(batch)
                return batch, StepResult(turn.token_ids)
        raise DivergedError(f"{turn.ended} ended, and {list(map(pieces, self._flying))} fly")

    def run(self, batch: Batch) -> StepResult:
        raise AssertionError("a divided engine begins its steps and waits for them")

    def successor(self) -> _Playback:
        return _Playback()

    def close(self) -> None: ...


def replay(
    recording: DividedRecording, make: Callable[[ConcurrentExecutor, Clock], DividedEngine]
) -> list[tuple[Begun, ...]]:
    """Return what began at each step of an engine that is given what was recorded.

    `make` builds it, with nothing in it and a controller that has seen nothing, on an executor and
    a clock. Equals `[turn.begun for turn in recording.turns]` where it decides as the live one did.
    """
    clock, executor = _Script(), _Playback()
    engine = make(executor, clock)
    found = []
    for event in recording.events:
        if isinstance(event, Joined):
            clock.times = deque([event.at_s])
            engine.add(event.request())
            continue
        clock.times = deque([event.launch_s, event.end_s])
        executor.turn, first = event, len(executor.begun)
        engine.step()
        found.append(tuple(executor.begun[first:]))
    return found
