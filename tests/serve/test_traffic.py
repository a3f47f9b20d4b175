"""The scheduler over random traffic: nothing leaks, nobody starves, order is kept."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.serve.batch import Batch
from toolkit.serve.request import FinishReason, Phase, Request, Status

sys.path.append(str(Path(__file__).parent))
from fake_engine import fake_engine, next_token, request


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
policies = st.sampled_from(["fcfs", "spf", "priority", "mlfq"])


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
