"""Decision parity of the divided engine: a live run decided again on its own recorded times."""

from __future__ import annotations

import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from toolkit.serve.assemble import EngineSettings, build
from toolkit.serve.request import Request, SamplingParams
from toolkit.serve.simulate.divided_replay import (
    DivergedError,
    DividedRecorder,
    replay,
)
from toolkit.serve.split.controller import Controller, ControllerConfig, Dynamic, Fixed
from toolkit.serve.split.engine import DividedEngine
from toolkit.serve.split.settings import SplitSettings

sys.path.append(str(Path(__file__).parent))
from tiny_models import tiny_model

# So little memory that somebody is preempted.
SETTINGS = EngineSettings(
    threads=2, kv_bytes=260 * 256, block_size=4, max_context=220, max_batch=5, step_tokens=24,
    policy="spf", split=SplitSettings("auto"),
)  # fmt: skip


def fresh(engine: DividedEngine, kind: str) -> Controller:
    """A controller that has seen nothing and changes its mind at once."""
    cost = engine.controller.cost  # type: ignore[attr-defined]
    quick = ControllerConfig(dwell_s=0.0, interval_s=0.0, margin=0.0)
    if kind == "fixed":
        return Fixed(cost, engine.controller.layouts[-1])
    if kind == "target":
        return Dynamic(cost, replace(quick, tbt_target_s=3e-3))
    return Dynamic(cost, replace(quick, may_undivide=kind == "auto"))


def live(kind: str, seed: int) -> tuple[DividedRecorder, list[Request]]:
    """A burst of requests on this machine's cores."""
    source = random.Random(seed)
    engine, _ = build(tiny_model(), SETTINGS)
    assert isinstance(engine, DividedEngine)
    engine.controller = fresh(engine, kind)
    recorder, asked = DividedRecorder(engine), []
    coming = [
        Request(
            f"r{at}",
            tuple(range(10, 10 + source.choice([4, 30])))
            + tuple(source.randrange(5, 500) for _ in range(source.choice([1, 5, 60]))),
            SamplingParams(
                max_tokens=source.choice([2, 15, 40]), temperature=source.choice([0, 1.0]), seed=at
            ),
        )
        for at in range(12)
    ]
    start_s = time.perf_counter()
    engine.executor.start()
    try:
        while coming or engine.has_work:
            while coming and (source.random() < 0.2 or not engine.has_work):
                asked.append(coming.pop())
                asked[-1].arrival_s = time.perf_counter() - start_s
                recorder.add(asked[-1])
            recorder.step()
    finally:
        engine.executor.close()
    return recorder, asked


@pytest.mark.parametrize("kind", ["fixed", "auto", "target"])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_decides_again_as_it_did(kind: str, seed: int) -> None:
    recorder, _ = live(kind, seed)
    lived = recorder.engine
    turns = recorder.recording.turns
    assert len(turns) > 40
    controller = fresh(lived, kind)
    again = replay(
        recorder.recording,
        lambda executor, clock: DividedEngine(
            lived.scheduler.successor(), executor, clock, controller
        ),
    )
    assert again == [turn.begun for turn in turns]
    if isinstance(controller, Dynamic) and isinstance(lived.controller, Dynamic):
        assert controller.num_changes == lived.controller.num_changes
        assert [one.reason for one in controller.history] == [
            one.reason for one in lived.controller.history
        ]


def test_another_controller_decides_otherwise() -> None:
    recorder, _ = live("fixed", 0)
    lived = recorder.engine
    controller = fresh(lived, "auto")
    with pytest.raises(DivergedError):
        replay(
            recorder.recording,
            lambda executor, clock: DividedEngine(
                lived.scheduler.successor(), executor, clock, controller
            ),
        )
