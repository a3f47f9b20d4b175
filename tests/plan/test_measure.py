"""Timing the finalists: which is kept, what its plan remembers, what cannot be measured."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from toolkit.cli.plan import app
from toolkit.errors import ToolkitError, UsageError
from toolkit.hardware import find_cluster
from toolkit.plan import io, measure, subject
from toolkit.plan.measure import Measured
from toolkit.plan.search import measured, search


@pytest.fixture(scope="module")
def found():
    return search(subject.load("gpt-tiny", batch=8, tokens=64), find_cluster("cpux2"))


def test_the_finalist_measured_fastest_is_kept_and_knows_the_others(found, monkeypatch) -> None:
    times = [Measured((3.0, 5.0), 1.2), Measured((), None, "no rung"), Measured((2.0, 4.0), 0.8)]
    monkeypatch.setattr(measure, "measure", lambda plans, **_: times[: len(plans)])
    kept, timed = measured.fastest(found, 3)
    assert kept.plan.mesh == found.finalists[2].plan.mesh
    assert kept.plan.microbatches == found.finalists[2].plan.microbatches
    assert kept.best is found.finalists[2].candidate
    assert [one.measured for one in timed] == [times[2], times[0], times[1]]
    slower = found.finalists[0].candidate.description
    (reason,) = [one.reason for one in kept.plan.considered if one.description == slower]
    assert reason == "measured 4 s here, the plan itself 3 s"


def test_a_plan_gives_way_only_to_one_that_is_faster_in_nearly_all_rounds(
    found, monkeypatch
) -> None:
    slow, fast = (1.0,) * 8, (0.99,) * 7 + (1.2,)
    once_more_slower = (0.9,) * 6 + (1.01, 1.2)
    for rounds, kept_index in ((fast, 1), (once_more_slower, 0)):
        times = [Measured(slow, 1.0), Measured(rounds, 0.99), Measured((2.0,) * 8, 2.0)]
        monkeypatch.setattr(measure, "measure", lambda plans, times=times, **_: times[: len(plans)])
        monkeypatch.setattr(measure, "prolonged", lambda first, _more: list(first))
        kept, timed = measured.fastest(found, 3)
        assert kept.best is found.finalists[kept_index].candidate
        assert timed[0].finalist is found.finalists[kept_index]
        assert timed[2].measured == times[2]


def test_what_is_to_be_measured_differs_in_microbatches_first() -> None:
    traced = subject.load("gpt-tiny", batch=64, tokens=64)
    varied = search(traced, find_cluster("cpux2"), num_finalists=3, varied=True)
    assert [one.plan.microbatches for one in varied.finalists[:3]] == [1, 2, 4]
    assert all(one.plan.mesh == varied.plan.mesh for one in varied.finalists[:3])


def test_plans_that_are_close_are_timed_for_longer(found, monkeypatch) -> None:
    first = [Measured((1.1, 1.1), 1.03), Measured((1.0, 1.0), 0.95), Measured((2.0, 2.0), 1.9)]
    more = [Measured((1.0, 1.0, 1.0), 0.9), Measured((1.2, 1.2, 1.2), 1.1)]
    asked = []

    def times(plans, rounds=measure.ROUNDS, **_):
        asked.append((len(plans), rounds))
        return more if rounds > measure.ROUNDS else first

    monkeypatch.setattr(measure, "measure", times)
    kept, timed = measured.fastest(found, 3)
    assert asked == [(3, 3), (2, 5)]
    assert kept.best is found.finalists[0].candidate
    assert timed[0].measured.rounds_s == (1.1, 1.1, 1.0, 1.0, 1.0)
    assert timed[2].measured == first[2]


def test_where_no_plan_runs_it_says_why(found, monkeypatch) -> None:
    refused = Measured((), None, "no rung runs this")
    monkeypatch.setattr(measure, "measure", lambda plans, **_: [refused] * len(plans))
    with pytest.raises(ToolkitError, match="none of 2 plans could be run here: no rung runs this"):
        measured.fastest(found, 2)


def test_a_machine_getting_slower_does_not_change_what_is_relative() -> None:
    entries = [{"step_s": one} for one in (1.0, 2.0, 20.0, 10.0, 100.0, 200.0)]
    first, second = measure._together(2, [0, 1, 1, 0, 0, 1], entries)
    assert first.relative == pytest.approx(2 / 3)
    assert second.relative == pytest.approx(4 / 3)
    assert first.rounds_s == (1.0, 10.0, 100.0)


def test_more_ranks_than_cores_are_not_measured() -> None:
    with pytest.raises(UsageError, match="cannot measure 4096 ranks of"):
        measure.check(4096, find_cluster("cpux4096"))


def test_search_times_its_fastest_on_ranks(tmp_path) -> None:
    path = tmp_path / "plan.json"
    arguments = ["search", "gpt-tiny", "--cluster", "cpux2", "--batch", "4", "--tokens"]
    arguments += ["32", "--measure", "2", "-o", str(path), "--json"]
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 0, ended.output
    timed = json.loads(ended.stdout)["measured"]
    assert len(timed) == 2
    assert all(one["measured_s"] > 0 and len(one["rounds_s"]) in (3, 8) for one in timed)
    pairs = zip(timed[0]["rounds_s"], timed[1]["rounds_s"], strict=False)
    assert any(kept_s < other_s for kept_s, other_s in pairs)
    kept = io.load(path)
    others = [one for one in kept.considered if one.description == timed[1]["description"]]
    assert "measured" in others[0].reason
