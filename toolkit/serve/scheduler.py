"""Which tokens the next step computes: continuous batching over one pool of KV blocks.

Pure bookkeeping. No torch, no clock (times are arguments), no sleep: the live engine and the
simulator run this same object.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Sequence

from toolkit.errors import UsageError
from toolkit.serve.batch import Batch, Slice, Token
from toolkit.serve.kv.blocks import BlockPool
from toolkit.serve.kv.tables import BlockTables
from toolkit.serve.limits import SchedulerConfig
from toolkit.serve.policy.base import Policy
from toolkit.serve.programs.table import ProcessTable
from toolkit.serve.queue import WaitingQueue
from toolkit.serve.request import FinishReason, Phase, Request, Status, TooLongError

BOTH = (Phase.DECODE, Phase.PREFILL)


class Scheduler:
    """Owns every request from `add` to its last token, and every KV block."""

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        prefill_policy: Policy,
        decode_policy: Policy,
        programs: ProcessTable | None = None,
    ) -> None:
        if pool.capacity_tokens < config.max_context:
            # A lone request must always fit: then preemption always lets somebody finish.
            raise UsageError(
                f"the KV cache holds {pool.capacity_tokens} tokens, fewer than a context of "
                f"{config.max_context}",
                remedy="give it more memory, or lower the maximum context",
            )
        self.config = config
        self.pool = pool
        self.tables = BlockTables(pool, prefix_cache=config.prefix_cache)
        self.prefill_policy = prefill_policy
        self.decode_policy = decode_policy
        self.programs = ProcessTable() if programs is None else programs
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.num_finished = dict.fromkeys(FinishReason, 0)
        self.queue = WaitingQueue(
            prefill_policy, max_requests=config.max_queue, max_tokens=config.max_queue_tokens
        )
        self._arrivals = 0
        self.num_steps = 0
        self._ranked_version = pool.version

    def successor(self) -> Scheduler:
        """Return a scheduler with the same limits and policies, and nothing in it."""
        pool = BlockPool(self.pool.num_blocks, self.pool.block_size)
        prefill = self.prefill_policy.fresh()
        shared = self.decode_policy is self.prefill_policy
        decode = prefill if shared else self.decode_policy.fresh()
        return Scheduler(self.config, pool, prefill, decode, self.programs.fresh())

    # -- what is there -------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.queue.num_requests)

    # -- arrival and departure -------------------------------------------------------------------

    def validate(self, request: Request) -> None:
        """Raise UsageError unless the request could ever be served."""
        length = len(request.prompt_ids)
        if length == 0:
            raise UsageError("the prompt is empty", remedy="give it at least one token")
        if length >= self.config.max_context:
            raise TooLongError(
                f"the prompt has {length} tokens and the context is {self.config.max_context}, "
                "which leaves no room to generate",
                remedy="shorten the prompt, or raise the maximum context",
            )

    def add(self, request: Request, now: float) -> None:
        """Queue a new request. Raises UsageError when it could never be served."""
        self.validate(request)
        length, limit = len(request.prompt_ids), request.sampling.max_tokens
        request.max_total_tokens = min(
            self.config.max_context, length + (limit or self.config.max_context)
        )
        eos_ids = frozenset() if request.sampling.ignore_eos else self.config.eos_ids
        request.end_ids = request.sampling.stop_token_ids | eos_ids
        request.arrival_seq, self._arrivals = self._arrivals, self._arrivals + 1
        request.since_s = now
        request.program = self.programs.on_arrival(request, now)
        for policy in self.policies:
            policy.on_arrival(request, request.program, now)
        self._wait(request, now)

    def finish(self, request: Request, reason: FinishReason, now: float) -> None:
        """End a request now: its client has gone, or its text met a stop string.

        A request in flight keeps its blocks until the step that writes to them is over.
        """
        if request.status is Status.FINISHED:
            return
        if request.status is Status.WAITING:
            self.queue.discard(request)
        request.waited_s, request.served_s = request.waiting_s(now), request.service_s(now)
        request.status = Status.FINISHED
        request.finish_reason = reason
        request.finished_s = now
        self.num_finished[reason] += 1
        # The program first: what policies do may depend on what it has now been given.
        self.programs.on_complete(request, now)
        for policy in self.policies:
            policy.on_complete(request, request.program, now)
        if not request.in_flight:
            self._release(request)

    # -- the step --------------------------------------------------------------------------------

    def schedule(
        self, now: float, phases: Collection[Phase] = BOTH, *, beside_tokens: int | None = None
    ) -> Batch:
        """Choose what the next step computes; what it contains is in flight until `update`.

        With both phases, decoding requests come first and prefill chunks fill the step up, with at
        most `beside_tokens` where anybody decodes. A divided engine asks for one phase at a time,
        each with a step of its own.
        """
        slices: list[Slice] = []
        if Phase.PREFILL in phases:
            self._rank(now)
            self._displace(now)
        before = self.num_preemptions
        if Phase.DECODE in phases:
            slices += self._decode_slices(now)
        if Phase.PREFILL in phases:
            # Whoever was just preempted must not take the freed blocks straight back.
            may_admit = self.num_preemptions == before
            budget = self.config.step_tokens - len(slices)
            if slices and beside_tokens is not None:
                budget = min(budget, beside_tokens)
            slices += self._prefill_slices(budget, may_admit, now)
        self.num_steps += 1
        return Batch(self.num_steps, tuple(slices))

    def update(
        self, batch: Batch, token_ids: Sequence[int | None], now: float, seconds: float = 0.0
    ) -> list[Token]:
        """Take in a step's results, `seconds` after it began; return the tokens drawn."""
        drawn: list[Token] = []
        listening = [policy for policy in self.policies if policy.hears_service]
        for piece, token_id in zip(batch.slices, token_ids, strict=True):
            request = piece.request
            request.in_flight = False
            if request.status is Status.FINISHED:
                self._release(request)
                continue
            self.tables.advance(request, piece.end)
            for policy in listening:
                policy.on_service(request, request.program, seconds, piece.num_tokens, now)
            known = request.num_tokens
            if piece.end < known:
                continue
            assert token_id is not None, f"no token drawn for {request.id}"
            if request.phase is Phase.PREFILL:
                request.phase = Phase.DECODE
            before_s = request.arrival_s if request.last_token_s is None else request.last_token_s
            request.output_ids.append(token_id)
            if request.grammar is not None:
                request.grammar.accept(token_id)
            request.last_token_s = now
            if request.first_token_s is None:
                request.first_token_s = now
            reason = self._ending(request, token_id, known + 1)
            if reason is not None:
                self.finish(request, reason, now)
            index = known - len(request.prompt_ids)
            drawn.append(Token(request, token_id, index, now - before_s, reason))
        return drawn

    def cancel(self, batch: Batch) -> None:
        """Take back a step that was not completed; its slices will be scheduled again."""
        for piece in batch.slices:
            piece.request.in_flight = False
            if piece.request.status is Status.FINISHED:
                self._release(piece.request)

    # -- many steps at once ----------------------------------------------------------------------

    def only_decodes(self, now: float) -> bool:
        """Return whether the step at `now` can hold decoding requests alone.

        It stays so until a request comes or ends, or until a key changes.
        """
        if any(request.phase is Phase.PREFILL for request in self.running):
            return False
        if not self.queue.num_requests:
            return True
        policy = self.prefill_policy
        if policy.ranks_cached and self.config.prefix_cache:
            return False
        self._rank(now)
        head = self.queue.head()
        assert head is not None
        if policy.preempts and any(policy.outranks(head[1], each) for each in self.running):
            return False
        full = len(self.running) >= self.config.max_batch
        return full or self.tables.lacking(head[1], self._spare()) > 0

    def decoding(self, now: float) -> list[Request]:
        """Return the requests whose next token a step at `now` may compute, in their order."""
        ready = [r for r in self.running if r.phase is Phase.DECODE and not r.in_flight]
        ready.sort(key=lambda request: self.decode_policy.key(request, request.program, now))
        return ready

    def count_steps(self, num: int) -> None:
        """Number the next step as if `num` more had been scheduled."""
        self.num_steps += num

    def _decode_slices(self, now: float) -> Iterator[Slice]:
        ready = self.decoding(now)
        for request in ready[: self.config.step_tokens]:
            if request.status is Status.RUNNING and self._make_room(request, now):
                yield self._fly(request, 1)

    def _prefill_slices(self, budget: int, may_admit: bool, now: float) -> Iterator[Slice]:
        key = self.prefill_policy.key
        resident = [
            (key(r, r.program, now), r)
            for r in self.running
            if r.phase is Phase.PREFILL and not r.in_flight
        ]
        heapq.heapify(resident)
        while budget > 0:
            head = self.queue.head() if may_admit else None
            if head is not None and (not resident or head[0] < resident[0][0]):
                if not self._admit(head[1], now):
                    # No skip-ahead: a later, smaller request must not overtake for ever.
                    may_admit = False
                    continue
                request = head[1]
            elif resident:
                request = heapq.heappop(resident)[1]
            else:
                return
            count = min(budget, request.num_pending)
            budget -= count
            yield self._fly(request, count)

    def _fly(self, request: Request, count: int) -> Slice:
        request.in_flight = True
        start = request.num_computed
        return Slice(request, request.phase, start, start + count)

    def _ending(self, request: Request, token_id: int, num_tokens: int) -> FinishReason | None:
        if token_id in request.end_ids or (request.grammar and request.grammar.ended):
            return FinishReason.STOP
        if num_tokens >= request.max_total_tokens:
            return FinishReason.LENGTH
        return None

    # -- memory ----------------------------------------------------------------------------------

    def _spare(self) -> int:
        """Blocks kept for those decoding, or a newcomer would cause a preemption at once."""
        return -(-self.pool.num_blocks // 100) if self.running else 0

    def _admit(self, request: Request, now: float) -> bool:
        """Let a waiting request start: it has a place and all its blocks. False: not now."""
        if len(self.running) >= self.config.max_batch:
            return False
        if self.tables.is_coming(request, self.running):
            return False
        if not self.tables.open(request, self._spare()):
            return False
        self.queue.pop()
        request.waited_s, request.since_s = request.waiting_s(now), now
        request.status = Status.RUNNING
        if request.scheduled_s is None:
            request.scheduled_s = now
        self.running.append(request)
        for policy in self.policies:
            policy.on_admit(request, request.program, now)
        return True

    def _displace(self, now: float) -> None:
        """Preempt for the first in the queue whom it outranks, if that makes room for it."""
        head = self.queue.head()
        if head is None:
            return
        waiting, outranks = head[1], self.prefill_policy.outranks
        victims = [r for r in self.running if not r.in_flight and outranks(waiting, r)]
        if not victims:
            return
        victims.sort(key=lambda r: self.prefill_policy.key(r, r.program, now))
        lacking = self.tables.lacking(waiting, self._spare())
        places = self.config.max_batch - len(self.running)
        chosen: list[Request] = []
        while (lacking > 0 or places <= 0) and victims:
            chosen.append(victims.pop())
            lacking -= self.pool.num_sole(chosen[-1].block_ids)
            places += 1
        if lacking <= 0 and places > 0:
            for victim in chosen:
                self._preempt(victim, now)

    def _make_room(self, request: Request, now: float) -> bool:
        """Make the block of the next decoded token writable, preempting others if need be."""
        while not self.tables.grow(request):
            # Those already in this batch are in flight, so the victim is never one of them.
            victim = max(
                (r for r in self.running if not r.in_flight),
                key=lambda r: self.decode_policy.key(r, r.program, now),
            )
            self._preempt(victim, now)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request, now: float) -> None:
        """Take a request's blocks away; it waits again at its old place and is recomputed."""
        assert not request.in_flight, f"{request.id} is in flight"
        self.tables.close(request)
        request.phase = Phase.PREFILL
        request.served_s, request.since_s = request.service_s(now), now
        # It waits from now on, as far as policies and sums of time are concerned.
        request.status = Status.WAITING
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.running.remove(request)
        for policy in self.policies:
            policy.on_preempt(request, now)
        self._wait(request, now)

    def _wait(self, request: Request, now: float) -> None:
        if self.prefill_policy.ranks_cached:
            request.num_reusable = self.tables.reusable(request)
        self.queue.push(request, now)

    def _rank(self, now: float) -> None:
        """Bring the queue's order up to date with the time and with what is cached."""
        self.queue.refresh(now)
        if self.prefill_policy.ranks_cached and self._ranked_version != self.pool.version:
            self._ranked_version = self.pool.version
            for request in self.queue:
                request.num_reusable = self.tables.reusable(request)
            self.queue.rekey(now)

    def _release(self, request: Request) -> None:
        if request.block_ids:
            self.tables.close(request)
            self.running.remove(request)

    @property
    def policies(self) -> tuple[Policy, ...]:
        """Those that hear what happens, each once."""
        # One object in both slots hears each event once.
        if self.prefill_policy is self.decode_policy:
            return (self.prefill_policy,)
        return (self.prefill_policy, self.decode_policy)

    # -- invariants ------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks, counters and states agree: for tests."""
        self.pool.check_integrity([request.block_ids for request in self.running])
        self.queue.check_integrity()
        self.programs.check_integrity()
        assert len(self.running) <= self.config.max_batch, "more requests run than the batch allows"
        for request in self.running:
            finished = request.status is Status.FINISHED
            assert not finished or request.in_flight, f"{request.id} has ended and holds blocks"
            enough = self.pool.blocks_for(request.num_computed)
            assert len(request.block_ids) >= enough, f"{request.id} computed more than it holds"


__all__ = ["BOTH", "Scheduler", "SchedulerConfig", "Token"]
