"""Drives an engine with programs on virtual time: answers make for the next calls."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from toolkit.errors import UsageError
from toolkit.serve.clock import VirtualClock
from toolkit.serve.engine import Engine
from toolkit.serve.request import Request, SamplingParams
from toolkit.serve.simulate.agents import AgentProgram
from toolkit.serve.simulate.leap import Leaping
from toolkit.serve.simulate.text import Text

# Tokens below are those of system prompts; drawn ones are negative.
_FIRST_TOKEN = 1_000


@dataclass(frozen=True, slots=True)
class Finished:
    """A program that is over: seconds in all, in tools on its way, and what it was.

    `waited_s` and `served_s` are sums over its calls. The way is that of the calls that were
    answered last before another could be sent.
    """

    kind: str
    at_s: float
    end_s: float
    tools_s: float
    waited_s: float
    served_s: float
    num_calls: int
    num_tokens: int

    @property
    def latency_s(self) -> float:
        """Seconds between its beginning and its end that no tool took."""
        return self.end_s - self.at_s - self.tools_s

    @property
    def per_token_s(self) -> float:
        """Latency over output tokens: Autellix's program-level token latency."""
        return self.latency_s / self.num_tokens


class _Open:
    """A program under way."""

    __slots__ = (
        *("id", "made", "waiting_for", "followers", "left", "contexts", "tools_s"),
        *("waited_s", "served_s", "tokens_left", "readers"),
    )

    def __init__(self, name: str, made: AgentProgram) -> None:
        self.id = name
        self.made = made
        self.waiting_for = [len(set(call.after)) for call in made.calls]
        self.followers: list[list[int]] = [[] for _ in made.calls]
        # How many calls have yet to begin with each one's context.
        self.readers = [0] * len(made.calls)
        for index, call in enumerate(made.calls):
            for before in set(call.after):
                self.followers[before].append(index)
            if call.follows is not None:
                self.readers[call.follows] += 1
        self.left = len(made.calls)
        self.contexts: dict[int, tuple[Text, list[bytes]]] = {}
        self.tools_s = [0.0] * len(made.calls)
        self.waited_s = self.served_s = 0.0
        self.tokens_left = made.num_tokens


class ProgramDriver:
    """Sends programs to an engine and takes their answers, to the last one."""

    def __init__(
        self,
        engine: Engine,
        clock: VirtualClock,
        made: Iterable[AgentProgram],
        *,
        on_done: Callable[[Finished], None],
    ) -> None:
        """`made` are in order of time, and read no further than needed; `clock` is the engine's."""
        self.engine = engine
        self.clock = clock
        self.on_done = on_done
        self.num_calls = 0
        self.num_tokens = 0
        self.most_open = 0
        self._made = iter(made)
        self._next = next(self._made, None)
        # (when, tie, program, call) of calls that will be sent.
        self._coming: list[tuple[float, int, _Open, int]] = []
        self._ticks = itertools.count()
        self._tokens = itertools.count(_FIRST_TOKEN)
        self._systems: dict[tuple[str, int], Text] = {}
        self._sent: dict[str, tuple[_Open, int]] = {}
        self._open: dict[str, _Open] = {}
        self._num = 0

    def remaining(self, request: Request) -> float:
        """Return the output tokens that a call's program has yet to be given (for SRPT)."""
        return self._sent[request.id][0].tokens_left

    def run(self, *, stepwise: bool = False) -> None:
        """Go on until every program is over."""
        engine, clock = self.engine, self.clock
        leaping = engine if isinstance(engine, Leaping) and not stepwise else None
        while True:
            if not engine.has_work:
                upcoming_s = self.next_s()
                if upcoming_s == math.inf:
                    return
                clock.advance(max(0.0, upcoming_s - clock.now()))
            upcoming_s = self.join(clock.now())
            if not engine.has_work:
                continue
            if leaping is not None and leaping.leap(upcoming_s, self._ended, self.join):
                continue
            report = engine.step()
            for output in report.outputs:
                if output.finish_reason is not None:
                    self._ended(output.request, report.end_s)

    def next_s(self) -> float:
        """Return when the next call is sent, or program begins, by what is known now."""
        coming_s = self._coming[0][0] if self._coming else math.inf
        return coming_s if self._next is None else min(coming_s, self._next.at_s)

    def join(self, now: float) -> float:
        """Give the engine all calls that are to be sent by now; return when the next one is."""
        while self._next is not None and self._next.at_s <= now:
            self._begin(self._next)
            self._next = next(self._made, None)
        while self._coming and self._coming[0][0] <= now:
            at_s, _, program, index = heapq.heappop(self._coming)
            self._send(program, index, at_s)
        return self.next_s()

    def _begin(self, made: AgentProgram) -> None:
        program = _Open(f"p{self._num}", made)
        self._num += 1
        self._open[program.id] = program
        self.most_open = max(self.most_open, len(self._open))
        for index, waiting_for in enumerate(program.waiting_for):
            if not waiting_for:
                self._schedule(program, index, made.at_s + made.calls[index].tool_s)

    def _schedule(self, program: _Open, index: int, at_s: float) -> None:
        heapq.heappush(self._coming, (at_s, next(self._ticks), program, index))

    def _send(self, program: _Open, index: int, at_s: float) -> None:
        call = program.made.calls[index]
        names: list[bytes] = []
        if call.follows is None:
            context = self._system(program.made)
        else:
            context, known = program.contexts[call.follows]
            # Equal contexts have equal names: they are not worked out again.
            names = known[: len(context) // self.engine.scheduler.pool.block_size]
            program.readers[call.follows] -= 1
            if not program.readers[call.follows]:
                del program.contexts[call.follows]
        prompt = context.plus(next(self._tokens), call.new_tokens)
        request = Request(
            f"c{self.num_calls}",
            prompt,
            SamplingParams(max_tokens=call.output_tokens, ignore_eos=True),
            arrival_s=at_s,
            program_id=program.id,
            block_names=names,
        )
        self.num_calls += 1
        self.num_tokens += len(prompt) + call.output_tokens
        self._sent[request.id] = (program, index)
        self.engine.add(request)

    def _system(self, made: AgentProgram) -> Text:
        key = (made.kind, made.system_tokens)
        if key not in self._systems:
            self._systems[key] = Text().plus(len(self._systems) + 1, made.system_tokens)
        return self._systems[key]

    def _ended(self, request: Request, now: float) -> float:
        """A call is answered: send those that waited for it alone; return when the next is sent."""
        program, index = self._sent.pop(request.id)
        if len(request.output_ids) < program.made.calls[index].output_tokens:
            raise UsageError(
                f"call {index} of program {program.id} was cut at {request.num_tokens} tokens",
                remedy="raise the maximum context",
            )
        program.waited_s += request.waited_s
        program.served_s += request.served_s
        program.left -= 1
        program.tokens_left -= program.made.calls[index].output_tokens
        if program.readers[index]:
            assert isinstance(request.prompt_ids, Text)
            said = request.prompt_ids.plus(request.output_ids[-1], len(request.output_ids))
            program.contexts[index] = (said, request.block_names)
        for follower in program.followers[index]:
            program.waiting_for[follower] -= 1
            if not program.waiting_for[follower]:
                tool_s = program.made.calls[follower].tool_s
                program.tools_s[follower] = program.tools_s[index] + tool_s
                self._schedule(program, follower, now + tool_s)
        if not program.left:
            self._close(program, index, now)
        return self.next_s()

    def _close(self, program: _Open, index: int, now: float) -> None:
        del self._open[program.id]
        self.engine.scheduler.programs.end(program.id)
        made = program.made
        self.on_done(
            Finished(
                *(made.kind, made.at_s, now, program.tools_s[index]),
                *(program.waited_s, program.served_s, len(made.calls), made.num_tokens),
            )
        )
