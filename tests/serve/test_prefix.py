"""The prefix cache: what one request computed, later ones find."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from toolkit.serve.model.tokenizer import Tokenizer
from toolkit.serve.request import Phase, Request, SamplingParams

sys.path.append(str(Path(__file__).parent))
from fake_engine import ask, fake_engine, run


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


def test_a_chat_finds_what_it_may_share(make_engine: Any, tokenizer: Tokenizer) -> None:
    """8 turns of a model, as clients play them: answers return as text and are encoded anew."""
    engine, size = make_engine(), 16
    messages: list[dict[str, str]] = []
    hit = shareable = computed = 0
    for turn in range(8):
        question = f"Here is thing number {turn} that I want to know: why is the sea so salty?"
        messages.append({"role": "user", "content": question})
        made = ask(engine, f"turn {turn}", tuple(tokenizer.chat(messages)), 12)
        hit += made.num_cached // size
        shareable += min(computed, len(made.prompt_ids) - 1) // size
        # The token drawn last never is.
        computed = made.num_tokens - 1
        messages.append({"role": "assistant", "content": tokenizer.decode(made.output_ids)})
    assert shareable > 40
    assert hit >= 0.95 * shareable


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
