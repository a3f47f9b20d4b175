"""The process table: every open program, what it was given and how long it waited.

After Autellix (arXiv 2502.13965, section 4.1). A program is a stream of calls, some of them at the
same time; nothing is known of it beforehand. Its service counts completed calls only, so that one
number per program is all a policy needs: `service` adds them up (one thread), `critical` is the
longest chain seen so far (many threads), where a call begins at what its program had reached when
it arrived. Times are arguments; nothing here reads a clock.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

from toolkit.errors import UsageError
from toolkit.serve.request import Request, Status


class State(enum.Enum):
    """What a program is doing."""

    RUNNING = "running"  # a call of it holds a place
    WAITING = "waiting"  # all its open calls wait
    IDLE = "idle"  # between calls: a tool runs, or it is over and nobody said so
    ENDED = "ended"


@dataclass(frozen=True)
class ServiceUnit:
    """What a call's service is measured in: seconds, or weighted tokens where a weight is given.

    Seconds are those in which the call held a place in the batch, whoever else did (the paper's).
    Tokens are machine-independent, and what llm-d counts: prompt tokens that no cache held, and
    output tokens.
    """

    per_prompt_token: float | None = None
    per_output_token: float | None = None

    def __post_init__(self) -> None:
        weights = (self.per_prompt_token, self.per_output_token)
        if (weights[0] is None) != (weights[1] is None):
            raise UsageError("service in tokens needs a weight for prompt and for output tokens")
        if any(weight is not None and weight < 0 for weight in weights) or weights == (0, 0):
            raise UsageError(f"weights of {weights} measure no service", remedy="use more than 0")

    @property
    def in_seconds(self) -> bool:
        return self.per_prompt_token is None

    def of(self, call: Request, now: float) -> float:
        """Return what a call has been given so far."""
        if self.per_prompt_token is None or self.per_output_token is None:
            return call.service_s(now)
        prompt = max(0, min(call.num_computed, len(call.prompt_ids)) - call.num_cached)
        if call.output_ids:
            prompt = len(call.prompt_ids) - call.num_cached
        return self.per_prompt_token * prompt + self.per_output_token * len(call.output_ids)


@dataclass(slots=True, eq=False)
class Program:
    """One program; the table alone changes it."""

    id: str
    opened_s: float
    service: float = 0.0
    critical: float = 0.0
    served_s: float = 0.0
    waited_s: float = 0.0
    num_calls: int = 0
    num_tokens: int = 0
    last_arrival_s: float = 0.0
    last_completion_s: float | None = None
    ended: bool = False
    # Open calls, by id, and what `critical` was when they arrived.
    calls: dict[str, Request] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)
    threads: dict[str, int] = field(default_factory=dict)

    @property
    def state(self) -> State:
        if any(call.status is Status.RUNNING for call in tuple(self.calls.values())):
            return State.RUNNING
        if self.calls:
            return State.WAITING
        return State.ENDED if self.ended else State.IDLE


class ProcessTable:
    """Programs by id. A call without a program is nobody's business here."""

    def __init__(
        self, unit: ServiceUnit | None = None, *, idle_s: float = 600.0, most: int = 100_000
    ) -> None:
        """`idle_s` without a call closes a program; beyond `most` the longest idle one closes."""
        if idle_s <= 0 or most < 1:
            raise UsageError(
                f"a table of {most} programs that are closed after {idle_s} s keeps none",
                remedy="use values above 0",
            )
        self.unit = unit or ServiceUnit()
        self.idle_s = idle_s
        self.most = most
        self.num_opened = 0
        self.num_expired = 0
        # Those without an open call are moved to the end when they become idle: the first of them
        # has been idle for longest.
        self._programs: dict[str, Program] = {}
        self._idle: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._programs)

    def __iter__(self) -> Iterator[Program]:
        return iter(self._programs.values())

    def get(self, program_id: str) -> Program | None:
        """Return a program, or None where it is not open."""
        return self._programs.get(program_id)

    def fresh(self) -> ProcessTable:
        """Return an empty table with the same settings."""
        return ProcessTable(self.unit, idle_s=self.idle_s, most=self.most)

    # -- what happens to calls -------------------------------------------------------------------

    def on_arrival(self, call: Request, now: float) -> Program | None:
        """A call has come; its program is opened where it is not open. Returns the program."""
        if call.program_id is None:
            return None
        self.expire(now)
        program = self._programs.get(call.program_id)
        if program is None:
            program = self._programs[call.program_id] = Program(call.program_id, now)
            self.num_opened += 1
        self._idle.pop(program.id, None)
        program.ended = call.ends_program
        program.last_arrival_s = now
        program.num_calls += 1
        program.calls[call.id] = call
        program.starts[call.id] = program.critical
        if call.thread_id is not None:
            program.threads[call.thread_id] = program.threads.get(call.thread_id, 0) + 1
        return program

    def on_complete(self, call: Request, now: float) -> None:
        """A call is over, for whatever reason: what it was given is its program's from now on."""
        program = call.program
        if program is None or program.calls.pop(call.id, None) is None:
            return
        given = self.unit.of(call, now)
        program.service += given
        program.critical = max(program.critical, program.starts.pop(call.id) + given)
        program.served_s += call.service_s(now)
        program.waited_s += call.waiting_s(now)
        program.num_tokens += len(call.output_ids)
        program.last_completion_s = now
        if not program.calls:
            if program.ended:
                self._close(program)
            else:
                self._idle[program.id] = None

    def end(self, program_id: str) -> bool:
        """A client says that a program is over; False where it is not open.

        Its open calls go on, and it is closed with the last of them.
        """
        program = self._programs.get(program_id)
        if program is None:
            return False
        program.ended = True
        if not program.calls:
            self._close(program)
        return True

    def expire(self, now: float) -> None:
        """Close programs that have been idle for too long, or are too many."""
        while self._idle:
            program = self._programs[next(iter(self._idle))]
            assert program.last_completion_s is not None
            over = now - program.last_completion_s >= self.idle_s
            if not over and len(self._programs) < self.most:
                return
            self._close(program)
            self.num_expired += 1

    def _close(self, program: Program) -> None:
        self._idle.pop(program.id, None)
        del self._programs[program.id]

    # -- to be seen ------------------------------------------------------------------------------

    def rows(self, now: float) -> list[dict[str, object]]:
        """Return every open program for people: service, waiting, state, calls, threads.

        Safe to ask from another thread: what changes meanwhile is in it or is not.
        """
        return [
            {
                "id": program.id,
                "state": program.state.value,
                "age_s": now - program.opened_s,
                "service_s": program.served_s
                + sum(call.service_s(now) for call in tuple(program.calls.values())),
                "waiting_s": program.waited_s
                + sum(call.waiting_s(now) for call in tuple(program.calls.values())),
                "critical": program.critical,
                "num_calls": program.num_calls,
                "num_open": len(program.calls),
                "num_threads": len(program.threads),
                "num_tokens": program.num_tokens,
            }
            for program in tuple(self._programs.values())
        ]

    def check_integrity(self) -> None:
        """Raise AssertionError unless open calls, idle programs and starts agree: for tests."""
        for name, program in self._programs.items():
            assert name == program.id
            assert (not program.calls) == (name in self._idle), f"{name} is idle or is not"
            assert set(program.calls) == set(program.starts), f"{name} lost the start of a call"
            for call in program.calls.values():
                assert call.status is not Status.FINISHED, f"{call.id} has ended and is open"
        assert set(self._idle) <= set(self._programs), "a closed program is idle"
