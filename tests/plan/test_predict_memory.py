"""What a plan holds over a step, against what is really allocated."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from toolkit import models
from toolkit.hardware import find_cluster
from toolkit.plan import planner, predict, subject
from toolkit.plan.lower.lowered import loss_of
from toolkit.plan.predict import events, memory, simulate
from toolkit.plan.tracking import Tracker

ROOT = Path(__file__).parents[2]
MODELS = {
    "gpt-tiny": {"batch": 4, "tokens": 32},
    "llama-tiny": {"batch": 4, "tokens": 32},
    "t5-tiny": {"batch": 4, "tokens": 32},
    "swin-nano": {"batch": 4},
    "toolkit.plan.verify.matrix:evoformer_one_pass": {"batch": 2},
}


def tracked(name: str, sizes: dict[str, int], microbatches: int) -> int:
    """The most one device holds in its second step of training."""
    model = models.load(name)
    module = model.build("cpu")
    pieces = []
    for _ in range(microbatches):
        small = {**sizes, "batch": sizes["batch"] // microbatches}
        pieces.append(model.example(**small, device="cpu"))
    optimizer = torch.optim.AdamW(module.parameters())
    with Tracker() as tracker:
        tracker.watch(module.parameters())
        for _ in range(2):
            tracker.reset()
            optimizer.zero_grad()
            for args, kwargs in pieces:
                loss = loss_of(module(*args, **kwargs))
                (loss / microbatches).backward()
                del loss
            optimizer.step()
    return tracker.peak_bytes


@pytest.mark.parametrize(
    ("name", "microbatches"), [*((name, 2) for name in MODELS), ("gpt-tiny", 1)]
)
def test_one_device_holds_what_was_predicted(name: str, microbatches: int) -> None:
    traced = subject.load(name, **MODELS[name])
    plan = planner.make(traced, find_cluster("cpux2"), "dp", num_ranks=1, microbatches=microbatches)
    assert plan.prediction is not None
    want = tracked(name, MODELS[name], microbatches)
    assert plan.prediction.peak_bytes == pytest.approx(want, rel=0.1)


def test_the_tracker_follows_what_comes_and_goes() -> None:
    with Tracker() as tracker:
        x = torch.ones(1024)
        view = x[:10]
        y = x + 1
        assert tracker.held_bytes == 2 * 4096
        del x, y
        assert tracker.held_bytes == 4096  # the view keeps all it looks at
        view.untyped_storage().resize_(0)
        assert tracker.held_bytes == 0
    assert tracker.peak_bytes == 2 * 4096


def test_a_pipeline_holds_fewer_microbatches_stage_by_stage(tiny) -> None:
    """1F1B: p - s microbatches alive on stage s; GPipe: all of them on every stage."""
    cluster = find_cluster("cpux4")

    def alive(strategy: str) -> list[int]:
        plan = planner.make(tiny, cluster, strategy, num_ranks=4, microbatches=8)
        made = predict.scripted(plan, tiny, cluster)
        found = []
        for position in range(4):
            one = made.held[position, position].life.kept
            most = max(usage.activations for _, usage in memory.over_time(made, position))
            found.append(-(-most // one))
        return found

    assert alive("1f1b") == [4, 3, 2, 1]
    assert alive("gpipe") == [8, 8, 8, 8]


def test_the_peak_is_a_moment_and_not_a_sum_of_peaks(tiny, two_ranks) -> None:
    plan = planner.make(tiny, two_ranks, "fsdp")
    made = predict.scripted(plan, tiny, two_ranks)
    usages = [usage for _, usage in memory.over_time(made, 0)]
    parts = [usage.by_category for usage in usages]
    assert max(usage.total for usage in usages) == plan.prediction.peak_bytes
    assert plan.prediction.peak_bytes < sum(max(one[key] for one in parts) for key in parts[0])


def test_what_is_divided_takes_its_share_of_memory(tiny, two_ranks) -> None:
    """ZeRO divides the moments, then the gradients, then the parameters."""
    held = [
        planner.make(tiny, two_ranks, name).prediction.memory_bytes[0]
        for name in ("dp", "zero-1", "zero-2", "fsdp")
    ]
    dp, zero_1, zero_2, fsdp = held
    assert zero_1["optimizer"] == pytest.approx(dp["optimizer"] / 2, rel=0.01)
    totals = [sum(one.values()) for one in held]
    assert totals == sorted(totals, reverse=True)
    assert zero_2["parameters"] == dp["parameters"]
    assert fsdp["parameters"] == pytest.approx(dp["parameters"] / 2, rel=0.01)


def test_a_timeline_shows_memory_as_the_step_goes(tiny, two_ranks) -> None:
    plan = planner.make(tiny, two_ranks, "1f1b", microbatches=4)
    run = predict.simulated(plan, tiny, two_ranks)
    counters = run.timeline("one step").counters
    assert [counter.name for counter in counters] == ["rank 0 memory", "rank 1 memory"]
    for position, counter in enumerate(counters):
        most = max(value for _, value in counter.samples)
        assert most == sum(plan.prediction.memory_bytes[position].values())
        assert all(a[0] <= b[0] <= run.step_s for a, b in itertools.pairwise(counter.samples))


def test_one_task_for_an_action_takes_as_long_as_its_pieces(tiny, monkeypatch) -> None:
    """What thousands of actions are simplified to changes the step by little."""
    cluster = find_cluster("h100x4")
    for strategy in ("1f1b", "fsdp", "zero-2"):
        plan = planner.make(tiny, cluster, strategy, num_ranks=2, microbatches=4)
        fine = predict.predict(plan, tiny, cluster).prediction
        monkeypatch.setattr("toolkit.plan.predict.script._MOST_PIECES", 0)
        made = predict.scripted(plan, tiny, cluster)
        tasks = list(events.tasks(made))
        coarse = simulate.run(tasks)
        monkeypatch.undo()
        assert coarse.step_s == pytest.approx(fine.step_s, rel=0.05)
        assert coarse.bubble == pytest.approx(fine.bubble, abs=0.05)


def test_halves_of_backward_do_together_what_the_whole_does(tiny, two_ranks) -> None:
    plan = planner.make(tiny, two_ranks, "zb-h1", microbatches=4)
    halves = predict.scripted(plan, tiny, two_ranks)
    whole = planner.make(tiny, two_ranks, "1f1b", microbatches=4)
    whole = predict.scripted(replace(whole, stages=plan.stages), tiny, two_ranks)
    for stage in range(2):
        for mine, other in zip(
            halves.held[stage, stage].pieces, whole.held[stage, stage].pieces, strict=True
        ):
            parts = sum(step.seconds for kind in "IW" for step in mine.steps[kind])
            assert parts == pytest.approx(sum(step.seconds for step in other.steps["B"]))
        life = halves.held[stage, stage].life
        assert 0 < life.owed < life.kept


@pytest.mark.slow
def test_ranks_hold_what_was_predicted(tmp_path: Path) -> None:
    """The library's plans on two gloo ranks: median error at most 10 %."""
    import json

    out = tmp_path / "rows.json"
    script = ROOT / "recipes" / "bench" / "plan_memory.py"
    subprocess.run([sys.executable, str(script), "--models", "t5", "--json", str(out)], check=True)
    errors = [abs(row["error"]) for row in json.loads(out.read_text())]
    assert len(errors) >= 20
    assert statistics.median(errors) <= 0.1
    assert max(errors) <= 0.25
