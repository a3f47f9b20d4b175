"""Two phases at once on real cores: the undivided engine's tokens, whatever the layout does."""

from __future__ import annotations

import ctypes
import functools
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.errors import InfeasibleError, UsageError
from toolkit.serve.assemble import Assembly, EngineSettings, build
from toolkit.serve.engine import Engine
from toolkit.serve.executor import phases
from toolkit.serve.executor.base import StepLostError
from toolkit.serve.executor.device import Place
from toolkit.serve.request import FinishReason, Phase, Request, SamplingParams
from toolkit.serve.split.controller import Decision, Fixed
from toolkit.serve.split.engine import DividedEngine
from toolkit.serve.split.settings import SplitSettings
from toolkit.serve.worker import Worker

sys.path.append(str(Path(__file__).parent))
from tiny_models import tiny_model

# So little memory that somebody is preempted.
SETTINGS = EngineSettings(
    threads=2, kv_bytes=260 * 256, block_size=4, max_context=220, max_batch=5, step_tokens=24
)
FIXED = replace(SETTINGS, split=SplitSettings("fixed"))


class Restless(Fixed):
    """Another layout at every step."""

    def __init__(self, before: Any, seed: int) -> None:
        super().__init__(before.cost, before.layouts[0])
        self.random, self.choices = random.Random(seed), before.layouts

    def decide(self, look: object, now: float) -> Decision:
        return Decision(self.random.choice(self.choices), now, "restless")


def requests(seed: int, num: int = 14) -> list[Request]:
    """Prompts that share beginnings, drawn greedily and not."""
    source, made = random.Random(seed), []
    for at in range(num):
        prompt = tuple(range(10, 10 + source.choice([4, 8, 30]))) + tuple(
            source.randrange(5, 500) for _ in range(source.choice([1, 5, 60]))
        )
        params = SamplingParams(
            max_tokens=source.choice([2, 20, 50]), temperature=source.choice([0.0, 1.0]), seed=at
        )
        made.append(Request(f"r{at}", prompt, params))
    return made


def serve(engine: Engine, asked: list[Request]) -> list[list[int]]:
    """Serve requests that join one by one while others run; return their tokens."""
    engine.executor.start()
    try:
        waiting = list(asked)
        while waiting or engine.has_work:
            if waiting:
                engine.add(waiting.pop(0))
            engine.step()
            engine.scheduler.check_integrity()
    finally:
        engine.executor.close()
    assert engine.scheduler.pool.num_used == 0
    return [request.output_ids for request in asked]


@functools.cache
def undivided_tokens(quantize: str = "none", num: int = 14) -> list[list[int]]:
    """What the undivided engine draws for `requests(1, num)`."""
    return serve(build(tiny_model(), replace(SETTINGS, quantize=quantize))[0], requests(1, num))


def divided(settings: EngineSettings) -> DividedEngine:
    engine, _ = build(tiny_model(), settings)
    assert isinstance(engine, DividedEngine)
    return engine


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("how", ["fixed", "auto", "restless"])
def test_its_tokens_are_the_undivided_engines(how: str, quantize: str) -> None:
    split = SplitSettings("fixed" if how == "fixed" else "auto")
    engine = divided(replace(SETTINGS, quantize=quantize, split=split))
    if how == "restless":
        engine.controller = Restless(engine.controller, 3)
    assert serve(engine, requests(1)) == undivided_tokens(quantize)
    steps = engine.num_steps
    assert steps["prefill"] > 0
    assert steps["decode"] > 0
    if how == "restless":
        assert steps["mixed"] > 0
    if quantize == "none":  # else keys and values are half as long, and there is room for all
        assert engine.scheduler.num_preemptions > 0
    assert engine.num_lost == 0


def test_phases_overlap_and_a_layout_is_followed() -> None:
    engine = divided(FIXED)
    begun: list[tuple[Phase | None, int, int]] = []
    begin = engine.executor.begin

    def noted(batch: Any, share: Any) -> None:
        kinds = {piece.phase for piece in batch.slices}
        begun.append((*kinds, share.units, len(engine._flights)))
        begin(batch, share)

    engine.executor.begin = noted
    serve(engine, requests(2, 6))
    assert {(phase, 1) for phase in Phase} <= {(phase, units) for phase, units, _ in begun}
    assert any(beside for _, _, beside in begun), "no step began while another was in flight"


# -- faults ---------------------------------------------------------------------------------------


class Faulty:
    """Stands before `compute` and does something else when it is a phase's turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, phase: Phase) -> None:
        self.phase, self.todo = phase, [None] * 2
        self.done = 0
        real = phases.compute

        def compute(decoder: Any, cache: Any, batch: Any) -> Any:
            if {piece.phase for piece in batch.slices} == {self.phase} and self.todo:
                act: Callable[[], None] | None = self.todo.pop(0)
                if act is not None:
                    self.done += 1
                    real(decoder, cache, batch)
                    act()
            return real(decoder, cache, batch)

        monkeypatch.setattr(phases, "compute", compute)


def fail() -> None:
    raise RuntimeError("a bit fell over")


def die() -> None:
    """End this thread from outside, as soon as it runs Python again."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(threading.get_ident()), ctypes.py_object(SystemExit)
    )
    for _ in range(1000):
        time.sleep(0.001)


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("act", [fail, die])
def test_a_lost_step_is_computed_again(
    phase: Phase, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody sees it: the same tokens, and the other phase went on."""
    faulty = Faulty(monkeypatch, phase)
    faulty.todo += [act, None, act, act]
    engine = divided(FIXED)
    assert serve(engine, requests(1)) == undivided_tokens()
    assert engine.num_lost == faulty.done == 3


def test_a_thread_that_ends_between_steps_is_replaced() -> None:
    engine = divided(FIXED)
    executor, ended = engine.executor, []
    begin = executor.begin

    def kill(batch: Any, share: Any) -> None:
        if not ended and engine.num_steps["decode"] == 3:
            crew = executor._crews[Phase.DECODE]
            assert crew.stop(10)
            ended.append(crew)
        begin(batch, share)

    executor.begin = kill
    assert serve(engine, requests(1, 4)) == undivided_tokens(num=4)
    assert ended


def test_a_step_that_is_lost_again_and_again_ends_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faulty = Faulty(monkeypatch, Phase.DECODE)
    faulty.todo += [fail] * 9
    engine = divided(FIXED)
    with pytest.raises(StepLostError, match="RuntimeError: a bit fell over"):
        serve(engine, requests(1))
    assert faulty.done == 3
    after = engine.successor()
    faulty.todo.clear()
    assert serve(after, requests(1, 4)) == undivided_tokens(num=4)


def test_one_who_left_during_a_lost_step_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = Faulty(monkeypatch, Phase.DECODE)
    engine = divided(FIXED)
    asked = Request("r", (5, 6, 7), SamplingParams(max_tokens=50))

    def leave() -> None:
        engine.scheduler.finish(asked, FinishReason.ABORT, 0.0)
        fail()

    faulty.todo += [leave]
    serve(engine, [asked])
    assert engine.num_lost == 1


def test_a_hung_phase_is_noticed_while_the_other_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's steps go on returning; what counts is since when the oldest has been going."""
    gate = threading.Event()
    faulty = Faulty(monkeypatch, Phase.DECODE)
    faulty.todo = [lambda: gate.wait(30)]
    engine = divided(FIXED)
    worker = Worker(engine, lambda _: None, lambda _: None)
    engine.executor.start()
    # Both begin at once, each on its own core.
    first = Request("first", (5, 6, 7), SamplingParams(max_tokens=5))
    engine.add(first)
    engine.step()
    engine.add(Request("second", tuple(range(100)), SamplingParams(max_tokens=5)))
    reports = [engine.step() for _ in range(3)]
    assert {report.divided.phase for report in reports if report.divided} == {Phase.PREFILL}
    assert worker.busy_s > sum(report.end_s - report.start_s for report in reports) * 0.9
    gate.set()
    while engine.has_work:
        engine.step()
    assert worker.busy_s == 0
    engine.executor.close()


def test_one_that_hangs_keeps_its_cache_when_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Freed memory must not be written to."""
    monkeypatch.setattr(phases, "_CLOSE_S", 0.1)
    gate = threading.Event()
    faulty = Faulty(monkeypatch, Phase.PREFILL)
    faulty.todo = [lambda: gate.wait(30)]
    engine = divided(FIXED)
    engine.executor.start()
    engine.add(Request("r", (5, 6, 7), SamplingParams(max_tokens=5)))
    engine._launch(0.0)
    engine.executor.close()
    assert engine.executor.cache.keys
    gate.set()


# -- what is refused ------------------------------------------------------------------------------


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(InfeasibleError, match="cannot be divided"):
        build(tiny_model(), replace(FIXED, threads=1))
    with pytest.raises(UsageError, match="did you mean 'auto'"):
        SplitSettings("aut")
    with pytest.raises(UsageError, match="leaves one phase none"):
        SplitSettings("fixed", prefill_part=1.0)
    torch_only = Place(torch.device("cpu"), torch.float32, lambda: 2**24)
    with pytest.raises(UsageError, match="divided"):
        build(tiny_model(), FIXED, torch_only)


def test_one_core_is_served_undivided_by_auto() -> None:
    engine = divided(replace(SETTINGS, threads=1, split=SplitSettings("auto")))
    assert [str(layout) for layout in engine.controller.layouts] == ["undivided"]
    assert serve(engine, requests(1, 4)) == undivided_tokens(num=4)


def test_it_says_how_it_lies() -> None:
    engine, executor = build(tiny_model(), replace(FIXED, pin=True))
    found = Assembly(engine, executor, None).layout()  # type: ignore[arg-type]
    assert found["layouts"] == ["1 | 1"]
    assert len(found["pinned_cpus"]) <= 2
