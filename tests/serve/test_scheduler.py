"""The scheduler over random traffic: nothing leaks, nobody starves, order is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import UsageError
from toolkit.serve.batch import Batch, StepResult
from toolkit.serve.clock import VirtualClock
from toolkit.serve.engine import Engine
from toolkit.serve.kv.blocks import BlockPool, BlockState
from toolkit.serve.policy import make
from toolkit.serve.queue import QueueFullError
from toolkit.serve.request import FinishReason, Phase, Request, SamplingParams, Status
from toolkit.serve.scheduler import Scheduler, SchedulerConfig


class FakeExecutor:
    """Draws a token that depends on the request and its position alone; checks what it reads.

    Its KV cache holds, per slot, the salt and all tokens up to the one written there: reading a
    block that somebody else has overwritten, or another's context, is noticed at once.
    """

    def __init__(self, clock: VirtualClock, pool: BlockPool) -> None:
        self.clock = clock
        self.pool = pool
        self.block_size = pool.block_size
        self.slots: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.batches: list[Batch] = []

    def start(self) -> None: ...

    def close(self) -> None: ...

    def run(self, batch: Batch) -> StepResult:
        self.batches.append(batch)
        tokens: list[int | None] = []
        for piece in batch.slices:
            request = piece.request
            known = tuple(request.tokens(0, piece.end))
            for position in range(piece.start, piece.end):
                block = request.block_ids[position // self.block_size]
                assert self.pool.state(block).value == piece.phase.value, "written by no writer"
                held = (request.cache_salt, known[: position + 1])
                self.slots[self._slot(request, position)] = held
            for position in range(piece.end):
                held = self.slots[self._slot(request, position)]
                assert held == (request.cache_salt, known[: position + 1]), f"{request.id}: {held}"
            tokens.append(next_token(request) if piece.samples else None)
        self.clock.advance(0.01 + 0.001 * batch.num_tokens)
        return StepResult(tuple(tokens))

    def _slot(self, request: Request, position: int) -> int:
        block = request.block_ids[position // self.block_size]
        return block * self.block_size + position % self.block_size


def next_token(request: Request) -> int:
    return 100 + (sum(request.prompt_ids) + 7 * len(request.output_ids)) % 50


def fake_engine(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    prefill: str = "fcfs",
    decode: str = "fcfs",
    **limits: int | frozenset[int] | None,
) -> tuple[Engine, FakeExecutor]:
    settings = {"max_batch": 8, "step_tokens": 32, "max_context": num_blocks * block_size} | limits
    clock = VirtualClock()
    pool = BlockPool(num_blocks, block_size)
    executor = FakeExecutor(clock, pool)
    scheduler = Scheduler(
        SchedulerConfig(**settings),  # type: ignore[arg-type]
        pool,
        make(prefill),
        make(decode),
    )
    return Engine(scheduler, executor, clock), executor


def run(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
        engine.scheduler.check_integrity()


def request(
    name: str, length: int = 3, max_tokens: int | None = 5, first: int = 1, **more: Any
) -> Request:
    prompt = tuple(range(first, first + length))
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens), **more)


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: int
    output: int
    abort_after: int | None
    first: int = 1
    priority: int = 0
    salt: str = ""

    def request(self, name: str, now: float = 0.0) -> Request:
        return request(
            name,
            self.prompt,
            self.output,
            self.first,
            arrival_s=now,
            priority=self.priority,
            cache_salt=self.salt,
        )


arrivals = st.builds(
    Arrival,
    step=st.integers(0, 20),
    prompt=st.integers(1, 40),
    output=st.integers(1, 30),
    abort_after=st.none() | st.integers(0, 10),
    # Few distinct beginnings, so that many prompts share theirs.
    first=st.sampled_from([1, 1, 2]),
    priority=st.integers(-1, 1),
    salt=st.sampled_from(["", "", "mine"]),
)
policies = st.sampled_from(["fcfs", "spf", "priority"])


@settings(max_examples=150, deadline=None)
@given(
    trace=st.lists(arrivals, min_size=1, max_size=14),
    num_blocks=st.integers(18, 40),
    block_size=st.integers(4, 7),
    max_batch=st.integers(1, 6),
    extra_tokens=st.integers(1, 30),
    prefill=policies,
    decode=policies,
    prefix_cache=st.booleans(),
)
def test_random_traffic(
    trace: list[Arrival],
    num_blocks: int,
    block_size: int,
    max_batch: int,
    extra_tokens: int,
    prefill: str,
    decode: str,
    prefix_cache: bool,
) -> None:
    engine, executor = fake_engine(
        num_blocks=num_blocks,
        block_size=block_size,
        max_batch=max_batch,
        step_tokens=max_batch + extra_tokens,
        prefill=prefill,
        decode=decode,
        prefix_cache=prefix_cache,
    )
    scheduler = engine.scheduler
    live: list[tuple[Arrival, Request]] = []
    pending = sorted(enumerate(trace), key=lambda item: item[1].step)
    for step in range(5000):
        while pending and pending[0][1].step <= step:
            index, arrival = pending.pop(0)
            made = arrival.request(f"r{index}", engine.clock.now())
            engine.add(made)
            live.append((arrival, made))
        for arrival, made in live:
            if arrival.abort_after is not None and step >= arrival.step + arrival.abort_after:
                engine.abort(made)
        scheduler.check_integrity()
        if not scheduler.has_work:
            if not pending:
                break
            continue
        report = engine.step()
        # Work conservation: where anything waits or runs, a step computes something.
        assert report.num_tokens > 0
        assert report.num_tokens <= scheduler.config.step_tokens
        assert len(executor.batches[-1].slices) <= max_batch
        ids = [piece.request.id for piece in executor.batches[-1].slices]
        assert len(ids) == len(set(ids)), "a request was served twice in one step"
        scheduler.check_integrity()
    assert not scheduler.has_work
    assert scheduler.pool.num_free == num_blocks
    for arrival, made in live:
        assert made.status is Status.FINISHED
        if made.finish_reason is not FinishReason.ABORT:
            assert made.finish_reason is FinishReason.LENGTH
            assert len(made.output_ids) == arrival.output
            # Preempted or not, the tokens are those of an undisturbed run.
            alone = Request("alone", made.prompt_ids, made.sampling)
            for token in made.output_ids:
                assert token == next_token(alone)
                alone.output_ids.append(token)
    assert sum(scheduler.num_finished.values()) == len(trace)


@settings(max_examples=100, deadline=None)
@given(
    trace=st.lists(arrivals, min_size=1, max_size=10),
    num_blocks=st.integers(18, 30),
    turns=st.lists(st.sampled_from(["prefill", "decode", "finish"]), min_size=4, max_size=40),
)
def test_random_traffic_with_both_phases_in_flight(
    trace: list[Arrival], num_blocks: int, turns: list[str]
) -> None:
    """A divided engine's life: each phase begins and ends its steps whenever it likes."""
    engine, executor = fake_engine(num_blocks=num_blocks, max_batch=4, step_tokens=12)
    scheduler = engine.scheduler
    made = [arrival.request(f"r{i}") for i, arrival in enumerate(trace)]
    for each in made:
        engine.add(each)
    flying: dict[str, Batch] = {}
    for step in range(20_000):
        if not scheduler.has_work:
            break
        # Whatever the drawn turns are, both phases go on getting theirs.
        turn = turns[step % len(turns)] if step < 200 else ("prefill", "decode", "finish")[step % 3]
        if turn == "finish":
            for name in sorted(flying):
                batch = flying.pop(name)
                scheduler.update(batch, executor.run(batch).token_ids, step)
        elif turn not in flying:
            batch = scheduler.schedule(step, (Phase(turn),))
            if batch:
                flying[turn] = batch
        ids = [piece.request.id for batch in flying.values() for piece in batch.slices]
        assert len(ids) == len(set(ids)), "a request is in flight twice"
        scheduler.check_integrity()
    assert not scheduler.has_work
    assert scheduler.pool.num_used == 0
    assert [len(each.output_ids) for each in made] == [arrival.output for arrival in trace]


def test_preemption_takes_the_newest_and_keeps_its_place() -> None:
    # 8 blocks of 4: two requests fit until both grow.
    engine, executor = fake_engine(num_blocks=8, block_size=4, max_batch=4, max_context=32)
    first, second = request("first", 8, 20), request("second", 8, 20, first=50)
    engine.add(first)
    engine.add(second)
    while not second.num_preemptions:
        engine.step()
    assert first.num_preemptions == 0
    assert second.status is Status.WAITING
    assert second.block_ids == []
    third = request("third", 8, 4)
    engine.add(third)
    assert (second.arrival_seq, third.arrival_seq) == (1, 2)
    run(engine)
    starts = [piece.request.id for batch in executor.batches for piece in batch.of(Phase.PREFILL)]
    assert starts.index("third") > len(starts) - 1 - starts[::-1].index("second")
    assert engine.scheduler.num_preemptions >= 1


def test_decoding_goes_on_while_a_long_prompt_is_prefilled_in_chunks() -> None:
    engine, executor = fake_engine(step_tokens=10, max_batch=4)
    engine.add(request("short", 4, 12))
    engine.step()
    engine.add(request("long", 50, 2))
    run(engine)
    chunked = [batch for batch in executor.batches if any(p.start for p in batch.of(Phase.PREFILL))]
    assert len(chunked) >= 4
    for batch in chunked:
        assert [piece.request.id for piece in batch.of(Phase.DECODE)] == ["short"]
        assert batch.num_tokens <= 10


def test_shortest_prompt_goes_first_and_age_is_forgiven() -> None:
    engine, executor = fake_engine(prefill="spf", max_batch=1, step_tokens=64, num_blocks=64)
    # At 15 tokens a second, 4 seconds of waiting outweigh 60 tokens less.
    for name, length, arrival_s in (("old", 60, 0.0), ("long", 40, 5.0), ("short", 5, 5.0)):
        engine.add(request(name, length, 2, arrival_s=arrival_s))
    run(engine)
    order = [piece.request.id for batch in executor.batches for piece in batch.of(Phase.PREFILL)]
    assert order == ["old", "short", "long"]


def test_a_request_ends_at_eos_stop_id_or_context() -> None:
    plain = request("plain", 3, None)
    eos = next_token(plain)
    engine, _ = fake_engine(num_blocks=4, block_size=4, max_context=16, eos_ids=frozenset({eos}))
    heedless = Request("heedless", plain.prompt_ids, SamplingParams(ignore_eos=True))
    stopped = Request(
        "stopped",
        plain.prompt_ids,
        SamplingParams(ignore_eos=True, stop_token_ids=frozenset({eos})),
    )
    for each in (plain, heedless, stopped):
        engine.add(each)
    run(engine)
    assert (plain.finish_reason, len(plain.output_ids)) == (FinishReason.STOP, 1)
    assert (stopped.finish_reason, len(stopped.output_ids)) == (FinishReason.STOP, 1)
    assert (heedless.finish_reason, heedless.num_tokens) == (FinishReason.LENGTH, 16)


def test_one_phase_at_a_time_shares_the_pool() -> None:
    """What a divided engine does: both phases in flight at once, each with its own step."""
    engine, executor = fake_engine(max_batch=4)
    scheduler = engine.scheduler
    engine.add(request("early", 6, 8))
    engine.step()
    engine.add(request("late", 20, 3))
    prefill = scheduler.schedule(1.0, (Phase.PREFILL,))
    decode = scheduler.schedule(1.0, (Phase.DECODE,))
    assert [piece.request.id for piece in prefill.slices] == ["late"]
    assert [piece.request.id for piece in decode.slices] == ["early"]
    assert not scheduler.schedule(1.0), "what is in flight was scheduled again"
    for batch in (decode, prefill):
        scheduler.update(batch, executor.run(batch).token_ids, 1.1)
        scheduler.check_integrity()
    run(engine)
    assert scheduler.pool.num_used == 0


def test_abort_in_flight_frees_blocks_only_after_the_step() -> None:
    engine, executor = fake_engine()
    scheduler = engine.scheduler
    gone = request("gone", 6, 8)
    engine.add(gone)
    batch = scheduler.schedule(0.0)
    engine.abort(gone)
    assert gone.block_ids
    assert scheduler.pool.num_used
    scheduler.check_integrity()
    assert scheduler.update(batch, executor.run(batch).token_ids, 0.1) == []
    assert scheduler.pool.num_used == 0
    engine.abort(gone)
    assert scheduler.num_finished[FinishReason.ABORT] == 1


def test_caps_on_what_waits() -> None:
    engine, _ = fake_engine(max_queue=2, max_queue_tokens=10)
    check_room = engine.scheduler.queue.check_room
    check_room(2, 10)
    with pytest.raises(QueueFullError, match="3 requests would wait and the cap is 2"):
        check_room(2, 3, num_coming=1, tokens_coming=3)
    with pytest.raises(QueueFullError, match="11 tokens"):
        check_room(1, 8, num_coming=1, tokens_coming=3)
    # Coming back later would not help these.
    with pytest.raises(UsageError, match="3 requests at once are more than may ever wait"):
        check_room(3, 3)
    with pytest.raises(UsageError, match="11 tokens at once"):
        check_room(1, 11)


def test_what_can_never_be_served_is_refused() -> None:
    engine, _ = fake_engine(num_blocks=4, block_size=4, max_context=16)
    with pytest.raises(UsageError, match="16 tokens and the context is 16"):
        engine.add(request("oversized", 16))
    with pytest.raises(UsageError, match="empty"):
        engine.add(request("empty", 0))
    assert not engine.has_work


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_context": 65}, "holds 64 tokens, fewer than a context of 65"),
        ({"max_context": 64, "step_tokens": 8}, "nothing for prefill"),
        ({"max_context": 64, "max_batch": 0}, "none"),
    ],
)
def test_contradictory_limits_are_refused(limits: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Scheduler(
            SchedulerConfig(**({"max_batch": 8, "step_tokens": 32} | limits)),
            BlockPool(16, 4),
            make("fcfs"),
            make("fcfs"),
        )


def test_journal_tells_steps_and_lives() -> None:
    engine, executor = fake_engine(max_batch=2, step_tokens=8)
    for at, name in enumerate(("a", "b", "c")):
        engine.add(request(name, 6, 4, first=10 * at))
    run(engine)
    timeline = engine.timeline()
    assert [track for track, _ in timeline.tracks] == [
        "prefill", "decode", "request 0", "request 1", "request 2",
    ]  # fmt: skip
    assert {source for _, source in timeline.tracks} == {"measured"}
    prefilled = sum(span.detail["tokens"] for span in timeline.on("prefill", "measured"))
    assert prefilled == 18
    waited = {span.name for span in timeline.on("request 2", "measured")}
    assert waited == {"queued", "prefill", "decode"}
    assert timeline.end_s == pytest.approx(executor.clock.now())


def ask(engine: Engine, name: str, prompt: tuple[int, ...], output: int = 1) -> Request:
    made = Request(name, prompt, SamplingParams(max_tokens=output))
    engine.add(made)
    run(engine)
    return made


def test_a_later_turn_finds_what_earlier_ones_computed() -> None:
    engine, _ = fake_engine(num_blocks=64, block_size=4)
    conversation: tuple[int, ...] = ()
    shareable = 0
    for turn in range(8):
        conversation += tuple(range(100 * turn, 100 * turn + 7))
        made = ask(engine, f"turn {turn}", conversation, 6)
        # All that was computed before: the last drawn token of a turn never is.
        assert made.num_cached == shareable
        conversation += tuple(made.output_ids)
        shareable = (len(conversation) - 1) // 4 * 4
    assert engine.scheduler.pool.num_used == 0


def test_a_whole_prompt_in_the_cache_still_computes_its_last_block() -> None:
    engine, executor = fake_engine(num_blocks=8, block_size=4, max_context=32)
    prompt = tuple(range(8))
    ask(engine, "first", prompt)
    again = ask(engine, "again", prompt)
    assert again.num_cached == 4
    assert executor.batches[-1].num_tokens == 4
    # The block it computed again is held once.
    assert engine.scheduler.pool.num_cached == 2


def test_another_salt_shares_nothing() -> None:
    engine, _ = fake_engine()
    prompt = tuple(range(9))
    ask(engine, "open", prompt)
    secret = Request("secret", prompt, SamplingParams(max_tokens=1), cache_salt="mine")
    engine.add(secret)
    run(engine)
    assert secret.num_cached == 0


def test_eviction_takes_the_longest_unused_and_children_first() -> None:
    engine, _ = fake_engine(num_blocks=8, block_size=4, max_batch=1, max_context=32)
    old, new = tuple(range(12)), tuple(range(50, 62))
    for name, prompt in (("old", old), ("new", new)):
        ask(engine, name, prompt)
    # 6 blocks are cached and 2 free: 3 more blocks evict the tail of the oldest chain.
    ask(engine, "third", tuple(range(90, 102)))
    pool = engine.scheduler.pool
    assert pool.num_evictions == 1
    assert ask(engine, "new again", (*new, 1)).num_cached == 12
    assert ask(engine, "old again", (*old, 1)).num_cached < 12
    pool.forget()
    assert (pool.num_cached, pool.num_free) == (0, 8)
    engine.scheduler.check_integrity()


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    engine, executor = fake_engine(block_size=4, step_tokens=16, max_batch=8)
    prompt = tuple(range(30))
    for choice in range(4):
        engine.add(Request(f"choice {choice}", prompt, SamplingParams(max_tokens=3)))
    run(engine)
    prefilled = sum(p.num_tokens for batch in executor.batches for p in batch.of(Phase.PREFILL))
    assert prefilled == 30 + 3 * 2


def test_shortest_counts_what_is_not_cached() -> None:
    engine, executor = fake_engine(prefill="spf", max_batch=1, step_tokens=64)
    known = tuple(range(40))
    ask(engine, "known", known)
    engine.add(Request("short", tuple(range(60, 70)), SamplingParams(max_tokens=1)))
    engine.add(Request("mostly cached", (*known, 1), SamplingParams(max_tokens=1)))
    run(engine)
    order = [piece.request.id for batch in executor.batches for piece in batch.of(Phase.PREFILL)]
    assert order == ["known", "mostly cached", "short"]


def test_urgent_requests_take_a_place_and_give_it_back() -> None:
    engine, _ = fake_engine(prefill="priority", decode="priority", max_batch=2)
    idle = [request(f"idle {i}", 6, 12, first=20 * i, priority=5) for i in range(2)]
    for each in idle:
        engine.add(each)
    engine.step()
    urgent = request("urgent", 6, 3, first=90, priority=-1)
    engine.add(urgent)
    engine.step()
    assert urgent.status is Status.RUNNING
    assert [each.num_preemptions for each in idle] == [0, 1]
    run(engine)
    assert urgent.finished_s is not None
    assert all(urgent.finished_s < each.finished_s for each in idle if each.finished_s)
    assert [len(each.output_ids) for each in idle] == [12, 12]


def test_a_block_published_is_never_written_again() -> None:
    pool = BlockPool(2, 4)
    (block,) = pool.allocate(1, Phase.PREFILL)
    pool.end_write(block)
    assert pool.publish(block, b"name", b"root") == block
    with pytest.raises(AssertionError, match="published"):
        pool.begin_write(block, Phase.DECODE)
    pool.release([block])
    assert pool.state(block) is BlockState.CACHED
    assert pool.match([b"name", b"next"]) == [block]
