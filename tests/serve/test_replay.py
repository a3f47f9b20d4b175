"""Decision parity: a live run's durations and tokens, played back, give its batches."""

from __future__ import annotations

import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from toolkit.serve.assemble import EngineSettings, build
from toolkit.serve.request import Request, SamplingParams
from toolkit.serve.simulate.replay import Recorder, Recording, replay

sys.path.append(str(Path(__file__).parent))
from tiny_models import tiny_model

# So little memory that somebody is preempted.
SETTINGS = EngineSettings(
    threads=1, kv_bytes=260 * 256, block_size=4, max_context=220, max_batch=5, step_tokens=24
)


def live(seed: int, policy: str) -> tuple[Recording, Recorder]:
    """A small model on this machine's CPU under a burst of requests that share beginnings."""
    source = random.Random(seed)
    recorder = Recorder(build(tiny_model(), replace(SETTINGS, policy=policy))[0])
    coming = []
    for at in range(16):
        prompt = tuple(range(10, 10 + source.choice([4, 8, 30]))) + tuple(
            source.randrange(5, 500) for _ in range(source.choice([1, 5, 60]))
        )
        params = SamplingParams(
            max_tokens=source.choice([2, 20, 70]), temperature=source.choice([0.0, 1.0]), seed=at
        )
        coming.append(
            Request(f"r{at}", prompt, params, priority=source.randrange(2), arrival_s=0.0)
        )
    start = time.perf_counter()
    while coming or recorder.engine.has_work:
        while coming and (source.random() < 0.4 or not recorder.engine.has_work):
            made = coming.pop()
            made.arrival_s = time.perf_counter() - start
            recorder.add(made)
        recorder.step()
    return recorder.recording, recorder


@pytest.mark.parametrize("policy", ["fcfs", "spf", "priority", "mlfq"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_simulator_decides_as_the_live_engine_did(policy: str, seed: int) -> None:
    recording, recorder = live(seed, policy)
    lived = recorder.engine.scheduler
    assert len(recording.steps) > 50
    again = lived.successor()
    batches = replay(recording, again)
    assert batches == [step.pieces for step in recording.steps]
    assert again.num_preemptions == lived.num_preemptions
    assert again.tables.num_hit == lived.tables.num_hit
    assert again.num_finished == lived.num_finished


def test_it_was_not_too_easy() -> None:
    """Memory was short, prefixes were shared, and some ended by themselves."""
    recorders = [live(seed, "fcfs")[1] for seed in range(3)]
    schedulers = [recorder.engine.scheduler for recorder in recorders]
    assert sum(each.num_preemptions for each in schedulers) > 0
    assert sum(each.tables.num_hit for each in schedulers) > 0


def test_another_policy_decides_otherwise() -> None:
    recording, _ = live(0, "fcfs")
    scheduler = build(tiny_model(), replace(SETTINGS, policy="spf"))[0].scheduler
    batches = replay(recording, scheduler)
    assert batches != [step.pieces for step in recording.steps]
