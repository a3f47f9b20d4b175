"""What the scheduler decides, step by step: who runs, who gives way, when a request ends."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from toolkit.serve.request import FinishReason, Phase, Request, SamplingParams, Status

sys.path.append(str(Path(__file__).parent))
from fake_engine import fake_engine, next_token, request, run


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
