from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from toolkit.cli.plan import app
from toolkit.errors import FormatError
from toolkit.hardware import find_cluster
from toolkit.hardware.scaled import scaled
from toolkit.plan import diff, explain, io, planner, predict
from toolkit.plan.plan import Alternative


@pytest.mark.parametrize("strategy", ["dp", "fsdp", "tp", "1f1b"])
def test_the_parts_of_a_step_add_up(strategy, tiny, two_ranks) -> None:
    plan = planner.make(tiny, two_ranks, strategy)
    found = explain.explain(plan, tiny, two_ranks)
    for one in found.spent:
        whole = one.compute_s + one.exposed_s + one.waiting_s
        assert whole == pytest.approx(found.prediction.step_s)
        assert min(one.compute_s, one.exposed_s, one.waiting_s) >= -1e-12


def test_more_of_what_binds_helps_and_the_next_best_is_named(tiny, two_ranks) -> None:
    plan = planner.choose(tiny, two_ranks)
    found = explain.explain(plan, tiny, two_ranks)
    changes = {change.what: change.step_s for change in found.changes}
    assert "arithmetic" in found.binding
    assert changes["10% more compute"] < 0.95 * found.prediction.step_s
    assert changes["10% more bandwidth"] <= found.prediction.step_s
    slower = [other.step_s for other in plan.considered if other.step_s and not other.reason]
    assert found.runner_up.step_s == min(slower)


def test_memory_binds_when_a_faster_plan_has_no_room(tiny, two_ranks) -> None:
    plan = planner.make(tiny, two_ranks, "fsdp")
    limit = plan.prediction.memory_limit_bytes
    faster = Alternative("dp", plan.prediction.step_s / 2, round(limit * 1.05), "no room")
    too_big = Alternative("bigger", plan.prediction.step_s / 3, limit * 2, "no room")
    found = explain.explain(replace(plan, considered=(faster, too_big)), tiny, two_ranks)
    assert found.binding.startswith("memory: 2 faster plans")
    assert found.fastest_unfit == too_big
    more = {change.what: change for change in found.changes}["10% more memory"]
    assert (more.instead, more.step_s) == ("dp", faster.step_s)


def test_better_hardware_is_what_it_says(tiny) -> None:
    cluster = find_cluster("2xh100x8")
    better = scaled(cluster, memory=1.5, compute=2.0, bandwidth=3.0)
    one, other = cluster.device(9), better.device(9)
    assert other.memory_bytes == int(one.memory_bytes * 1.5)
    assert other.peak("bfloat16") == 2 * one.peak("bfloat16")
    for pair in ((0, 1), (0, 9)):
        ratio = better.path(*pair).effective_bandwidth / cluster.path(*pair).effective_bandwidth
        assert ratio == pytest.approx(3.0)


def test_only_a_predicted_plan_is_explained(tiny, two_ranks) -> None:
    plan = replace(planner.make(tiny, two_ranks, "dp"), prediction=None)
    with pytest.raises(FormatError, match="no prediction"):
        explain.explain(plan, tiny, two_ranks)


def test_diff_names_what_differs_and_nothing_else(tiny, two_ranks) -> None:
    dp = planner.make(tiny, two_ranks, "dp")
    again = predict.predict(dp, tiny, two_ranks)
    assert diff.diff(dp, again) == ()
    seeded = replace(dp, seed=3)
    assert diff.diff(dp, seeded) == (diff.Change("seed", 0, 3),)
    fsdp = planner.make(tiny, two_ranks, "fsdp")
    changes = {change.what: (change.first, change.second) for change in diff.diff(dp, fsdp)}
    assert changes["blocks.0 over data"] == ("replicate", "shard")
    assert changes["predicted all_gather of position 0"][0] is None
    assert "model" not in changes


def test_the_command_line_explains_compares_and_exports(tiny, two_ranks, tmp_path) -> None:
    for name in ("dp", "1f1b"):
        io.save(planner.make(tiny, two_ranks, name), tmp_path / f"{name}.json")

    def run(*arguments: object):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    shown = run("explain", tmp_path / "1f1b.json")
    assert shown.exit_code == 0, shown.output
    assert "is bound by" in shown.output
    assert json.loads(run("explain", tmp_path / "dp.json", "--json").stdout)["spent"]
    differ = run("diff", tmp_path / "dp.json", tmp_path / "1f1b.json", "--json")
    assert differ.exit_code == 1
    assert json.loads(differ.stdout)["equal"] is False
    assert run("diff", tmp_path / "dp.json", tmp_path / "dp.json").exit_code == 0
    made = run("export", tmp_path / "1f1b.json", "-o", tmp_path / "out")
    assert made.exit_code == 0, made.output
    assert (tmp_path / "out" / "torchtitan.toml").exists()
    assert "1f1b" in run("library").output
