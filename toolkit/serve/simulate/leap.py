"""Many decode steps taken at once, to the same end as one after another.

While nobody arrives, no prompt is computed and no key changes, a decoding engine does the same
thing at every step: each request gets a token. What such a run changes is known beforehand, so it
is priced as a whole and booked once per request, per block that fills up and per request that ends,
not once per token. Requests, blocks, policies and clock are left exactly as the single steps would
have left them; `tests/serve/test_leap.py` holds the two against each other on every system.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np

from toolkit.hardware.share import Share
from toolkit.serve.batch import Batch, Slice
from toolkit.serve.executor.simulated import Ahead, SimulatedExecutor
from toolkit.serve.request import FinishReason, Phase, Request
from toolkit.serve.scheduler import Scheduler
from toolkit.serve.split import along

# Below this a run costs more to prepare than it saves.
_LEAST_STEPS = 3
# Steps priced at first: it is not known how many will be taken before something happens.
_FIRST_CHUNK = 24

# Called when a request ends, with the time; returns until when steps may begin from now on.
OnEnd = Callable[[Request, float], float]
# Gives the engine whoever has arrived by a time; returns when the next one will.
Join = Callable[[float], float]


@dataclass(frozen=True, slots=True)
class Leap:
    """What a run of steps drew: for each request one token at each of the first ends.

    `drawn` holds the request, how many tokens were computed of it before, and how many were drawn.
    """

    ends_s: Sequence[float]
    drawn: Sequence[tuple[Request, int, int]]

    def batch(self, step: int) -> Batch:
        """Return the run as one batch, for the journal."""
        return Batch(
            step,
            tuple(Slice(each, Phase.DECODE, start, start + num) for each, start, num in self.drawn),
        )


@dataclass(slots=True)
class _Member:
    """A decoding request: where it stood when the run began, and after how many steps it ends."""

    request: Request
    rank: int
    start: int
    last: int


class DecodeRun:
    """Steps that hold every decoding request until it ends, one after another."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: SimulatedExecutor,
        share: Share,
        *,
        until_s: float,
        ends_run: bool,
        on_end: OnEnd,
        join: Join | None = None,
        rests: Callable[[float], bool] = lambda now: True,
        look: Callable[[float, int, int], bool] = lambda now, num, context: True,
        observe: Callable[[Ahead, int, Sequence[float]], None] = lambda found, first, took_s: None,
    ) -> None:
        """No step begins at `until_s` or later, unless `join` takes in who has come by then. Where
        `ends_run`, the first request to end is the last.

        Before a step at which a controller no longer `rests`, it is asked to `look` at the time,
        the requests and their context, and says whether all stays as it is. `observe` hears of the
        steps taken, in order: what was foreseen, from which step on, and what each took.
        """
        self.scheduler = scheduler
        self.executor = executor
        self.share = share
        self.until_s = until_s
        self.ends_run = ends_run
        self.on_end = on_end
        self.join = join
        self.rests = rests
        self.look = look
        self.observe = observe
        self.ends_s: list[float] = []
        self.took_s: list[float] = []
        self._now = executor.clock.now()
        self._served_s = 0.0
        self._service_s = self._most_steps = math.inf
        self._opened = False
        self._buckets: list[list[_Member]] = []

    def take(self) -> Leap | None:
        """Take as many steps as are alike; None where they are too few to be worth it."""
        scheduler = self.scheduler
        requests = scheduler.decoding(self._now)
        if not requests or len(requests) > scheduler.config.step_tokens:
            return None
        if any(request.end_ids or request.grammar is not None for request in requests):
            return None
        service_s = min(
            (p.service_left_s(each) for p in scheduler.policies for each in requests),
            default=math.inf,
        )
        # A sum of many steps may be off by a few last bits from the policy's own.
        self._service_s = service_s * (1 - 1e-9)
        steps = min(
            (p.steps_left(each) for p in scheduler.policies for each in requests),
            default=math.inf,
        )
        if steps < _LEAST_STEPS:
            return None
        self._most_steps = steps
        members = [
            _Member(each, rank, each.num_computed, each.max_total_tokens - each.num_tokens)
            for rank, each in enumerate(requests)
        ]
        if self.ends_run and min(member.last for member in members) < _LEAST_STEPS:
            return None
        self._buckets = self._bucketed(members)
        self._run(members)
        if not self.ends_s:
            return None
        num = len(self.ends_s)
        return Leap(self.ends_s, [(m.request, m.start, min(m.last, num)) for m in members])

    def _run(self, members: list[_Member]) -> None:
        live = sorted(members, key=lambda member: (member.last, member.rank))
        context = sum(member.start + 1 for member in live)
        found: Ahead | None = None
        used, num = 0, _FIRST_CHUNK
        while live and self._goes_on(len(live), context):
            if found is None or used == found.num:
                if found is not None and found.num < found.counts.num:
                    break
                found, used = self._ahead(live, context, num), 0
                num *= 2
            taken = self._book(live, self._count(found, used, live[0].last))
            if not taken:
                break
            self.executor.pass_by(found, used, taken)
            self.observe(found, used, self.took_s[-taken:])
            used += taken
            self._now = self.ends_s[-1]
            context += taken * len(live)
            ended = 0
            while ended < len(live) and live[ended].last == len(self.ends_s):
                self._finish(live[ended])
                context -= live[ended].start + 1 + live[ended].last
                self.until_s = min(self.until_s, self.on_end(live[ended].request, self._now))
                ended += 1
            live = live[ended:]
            if ended and self.ends_run:
                break
        if self.ends_s:
            for member in sorted(live, key=lambda member: member.rank):
                self._settle(member, len(self.ends_s))

    def _goes_on(self, num: int, context: int) -> bool:
        """Whether a step may begin now, as far as time and a controller say."""
        if self._now >= self.until_s:
            if self.join is None:
                return False
            self.until_s = self.join(self._now)
        if self._served_s >= self._service_s or len(self.ends_s) >= self._most_steps:
            return False
        if not self.ends_s or self.rests(self._now):
            return True
        return self.look(self._now, num, context)

    def _ahead(self, live: list[_Member], context: int, num: int) -> Ahead:
        """Price the next `num` steps, in which some end."""
        done = len(self.ends_s)
        num = min(num, live[-1].last - done)
        sequences, contexts, left, at = [], [], len(live), 0
        for step in range(done, done + num):
            sequences.append(left)
            contexts.append(context)
            context += left
            while at < len(live) and live[at].last == step + 1:
                context -= live[at].start + 1 + live[at].last
                left, at = left - 1, at + 1
        counts = along.Counts(np.array(sequences), np.array(contexts, np.float64))
        return self.executor.ahead(counts, self.share)

    def _count(self, found: Ahead, used: int, last: int) -> int:
        """Return how many steps may be taken before one ends or time is up; note their ends."""
        most = min(found.num - used, last - len(self.ends_s))
        most = int(min(most, self._most_steps - len(self.ends_s)))
        times_s = found.times_s[used : used + most + 1].tolist()
        # A step begins where the one before ends.
        most = min(most, bisect_left(times_s, self.until_s))
        service_s = self._service_s - self._served_s + times_s[0]
        most = min(most, bisect_left(times_s, service_s))
        if most and not self.rests(times_s[most - 1]):
            rested = bisect_left(times_s, True, hi=most, key=lambda at_s: not self.rests(at_s))
            most = max(1, rested)
        self.ends_s += times_s[1 : most + 1]
        self.took_s += [end - begin for begin, end in pairwise(times_s[: most + 1])]
        self._served_s += times_s[most] - times_s[0]
        return most

    # -- blocks ----------------------------------------------------------------------------------

    def _bucketed(self, members: list[_Member]) -> list[list[_Member]]:
        """Members by the step, modulo the block size, at which they begin a new block."""
        size = self.scheduler.pool.block_size
        buckets: list[list[_Member]] = [[] for _ in range(size)]
        for member in members:
            buckets[-member.start % size].append(member)
        return buckets

    def _book(self, live: list[_Member], num: int) -> int:
        """Write the steps' blocks; return how many of them there is memory for."""
        pool, tables, size = self.scheduler.pool, self.scheduler.tables, len(self._buckets)
        first = len(self.ends_s) - num
        if not self._opened and num:
            # Blocks half filled change hands; those of new ones are taken with the others below.
            for member in live:
                if member.start % size:
                    tables.grow(member.request)
            self._opened = True
        for step in range(first, first + num):
            beginning = [m for m in self._buckets[step % size] if m.last > step]
            if len(beginning) > pool.num_free:
                del self.ends_s[step:], self.took_s[step:]
                return step - first
            for member in beginning:
                member.request.num_computed = member.start + step
                grown = tables.grow(member.request)
                assert grown, "a block was free and is not"
            # Whoever begins a block at the next step has filled one at this.
            for member in self._buckets[(step + 1) % size]:
                if member.last > step:
                    self._advance(member, step + 1)
        return num

    def _advance(self, member: _Member, steps: int) -> None:
        """Note that a request has taken so many steps; a block that this fills is published."""
        request, end = member.request, member.start + steps
        if self.scheduler.tables.prefix_cache:
            # A block's name is made of its tokens.
            self._write(request, end)
        self.scheduler.tables.advance(request, end)

    def _write(self, request: Request, end: int) -> None:
        missing = end - request.num_tokens
        if missing > 0:
            request.output_ids += [self.executor.token(request)] * missing

    # -- requests --------------------------------------------------------------------------------

    def _settle(self, member: _Member, steps: int) -> None:
        """Bring a request to where `steps` single steps would have brought it."""
        request, end = member.request, member.start + steps
        if request.num_computed < end:
            self.scheduler.tables.advance(request, end)
        self._write(request, end + 1)
        request.last_token_s = self.ends_s[steps - 1]
        for policy in self.scheduler.policies:
            if policy.hears_service:
                policy.on_services(
                    request, request.program, self.took_s[:steps], self.ends_s[:steps]
                )

    def _finish(self, member: _Member) -> None:
        self._settle(member, member.last)
        self.scheduler.finish(member.request, FinishReason.LENGTH, self._now)


@runtime_checkable
class Leaping(Protocol):
    """An engine that can take the steps up to the next event at once."""

    def leap(self, until_s: float, on_end: OnEnd, join: Join) -> Leap | None:
        """Take steps that begin before `until_s`; None where the next is not one of many alike.

        `on_end` is called when a request ends, and says until when steps may begin from then on;
        so does `join`, where whoever arrives changes nothing for those that decode.
        """
        ...
