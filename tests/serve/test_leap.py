"""Many decode steps at once: the same, to the last bit, as one after another."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.hardware import find_cluster
from toolkit.serve.bench.load import Arrival
from toolkit.serve.clock import VirtualClock
from toolkit.serve.request import Phase
from toolkit.serve.simulate import systems, workload
from toolkit.serve.simulate.drive import drive
from toolkit.serve.simulate.systems import SYSTEMS, Setup
from toolkit.serve.split import along
from toolkit.serve.split.cost_model import CostModel
from toolkit.serve.split.engine import DividedEngine
from toolkit.serve.split.predictor import Predictor
from toolkit.serve.split.sharded import sharded
from toolkit.serve.split.work import Load

sys.path.append(str(Path(__file__).parent))
from split_cases import cost_model

COST = cost_model()
SETUP = Setup(COST, max_context=16_000)


def both_ways(name: str, arrivals: tuple[Arrival, ...], setup: Setup) -> None:
    """Serve `arrivals` step by step and by leaps; everything that can be seen must be equal."""
    found = []
    for stepwise in (True, False):
        clock = VirtualClock()
        engine = systems.find(name).build(setup, clock)
        done: list[int] = []
        samples = drive(engine, clock, arrivals, on_done=partial(done.append, 1), stepwise=stepwise)
        scheduler = engine.scheduler
        scheduler.check_integrity()
        assert scheduler.pool.num_used == 0
        assert len(done) == len(arrivals)
        seen: dict[str, Any] = {
            "samples": samples,
            "preemptions": scheduler.num_preemptions,
            "finished": scheduler.num_finished,
            "steps": scheduler.num_steps,
            "computed": engine.executor.num_computed,
            "clock": clock.now(),
        }
        if isinstance(engine, DividedEngine):
            controller = engine.controller
            assert isinstance(controller, Predictor)
            seen |= {
                "kinds": engine.num_steps,
                "history": list(controller.history),
                "ratios": [each.ratio for each in controller.corrections.values()],
                "observed": [each.num_observed for each in controller.corrections.values()],
                "errors": [each.errors for each in controller.corrections.values()],
            }
        found.append(seen)
    assert found[0] == found[1]


@pytest.mark.parametrize("name", SYSTEMS)
class TestEverySystem:
    def test_as_it_comes(self, name: str) -> None:
        both_ways(name, workload.find("mixed").arrivals(2.0, 40, seed=3), SETUP)

    def test_with_noise(self, name: str) -> None:
        noisy = replace(SETUP, noise=0.2, seed=5)
        both_ways(name, workload.find("mixed").arrivals(3.0, 30, seed=1), noisy)

    def test_short_of_memory(self, name: str) -> None:
        """Preempted, and blocked at the head of the queue."""
        kv_bytes = 18_000 * COST.model.kv_bytes_per_token
        scarce = replace(SETUP, kv_bytes=kv_bytes, max_batch=64)
        both_ways(name, workload.find("sharegpt").arrivals(30.0, 80, seed=2), scarce)

    def test_short_of_places(self, name: str) -> None:
        few = replace(SETUP, max_batch=4, step_tokens=512)
        both_ways(name, workload.find("sharegpt").arrivals(math.inf, 40, seed=4), few)

    @settings(max_examples=15, deadline=None)
    @given(
        st.lists(
            st.tuples(st.floats(0, 0.4), st.integers(1, 900), st.integers(1, 120)),
            min_size=1,
            max_size=14,
        ),
        st.integers(1, 6),
        st.sampled_from([1, 7, 16]),
    )
    def test_any(self, name: str, gaps: Any, max_batch: int, block_size: int) -> None:
        at_s, arrivals = 0.0, []
        for gap_s, prompt, output in gaps:
            at_s += gap_s
            arrivals.append(Arrival(at_s, prompt, output))
        kv_bytes = 1100 * COST.model.kv_bytes_per_token
        setup = Setup(
            COST,
            max_context=1050,
            kv_bytes=kv_bytes,
            max_batch=max_batch,
            step_tokens=256,
            block_size=block_size,
        )
        both_ways(name, tuple(arrivals), setup)


def test_a_run_is_priced_as_its_steps_are() -> None:
    part, exchange = sharded(COST.model, find_cluster("l20x2"))
    for cost in (COST, CostModel(part, COST.device, exchange=exchange)):
        counts = along.Counts(
            np.array([70, 70, 3, 3, 1]), np.array([70_000.0, 70_070, 900, 903, 400])
        )
        chunk = cost.alone(Load.chunk(2048, 4096), Phase.PREFILL, 0.25)
        run = along.Runs(cost).decoding(counts, 0.75)
        beside = along.beside(run, chunk, cost.bandwidth)
        slowed = along.slowed(chunk, run, cost.bandwidth)
        for step, (num, context) in enumerate(zip(*map(list, counts), strict=True)):
            own = cost.alone(Load.decoding(int(num), int(context)), Phase.DECODE, 0.75)
            assert run.seconds[step] == own.seconds
            assert run.attention_bytes[step] == own.attention.moved_bytes
            assert run.dense_bytes[step] == own.dense.moved_bytes
            assert beside[step] == cost.beside(own, chunk)
            assert slowed[step] == cost.beside(chunk, own)


def test_leaps_take_most_of_the_steps() -> None:
    """What the equality above is worth: nearly all decoding is done by leaps."""
    arrivals = workload.find("mixed").arrivals(1.0, 40, seed=0)
    clock = VirtualClock()
    engine = systems.find("chunked").build(SETUP, clock)
    single = 0
    step = engine.step

    def counted() -> Any:
        nonlocal single
        single += 1
        return step()

    engine.step = counted  # type: ignore[method-assign]
    drive(engine, clock, arrivals)
    assert single < engine.scheduler.num_steps / 10
