"""What lives on the host: what is predicted of it, and which plans it goes with."""

from __future__ import annotations

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from toolkit.cli.plan import app
from toolkit.errors import FormatError, InfeasibleError, UsageError
from toolkit.hardware import find_cluster
from toolkit.hardware.catalogue import builtin
from toolkit.plan import check, diff, explain, export, io, library, planner, predict
from toolkit.plan.plan import Plan, Prediction, Split
from toolkit.units import GIB


@pytest.fixture(scope="module")
def eight():
    return find_cluster("h100x8")


@pytest.fixture(scope="module")
def two():
    return find_cluster("h100x2")


def predicted(plan: Plan) -> Prediction:
    assert plan.prediction is not None
    return plan.prediction


@pytest.mark.parametrize("strategy", ["dp", "zero-1", "zero-2", "fsdp", "hsdp", "1f1b", "grid"])
def test_the_states_leave_the_device_and_the_step_is_no_shorter(strategy, tiny, eight) -> None:
    degrees = {"num_ranks": 4, "microbatches": 2}
    plain = predicted(planner.make(tiny, eight, strategy, **degrees))
    moved = predicted(planner.make(tiny, eight, strategy, offload="optimizer", **degrees))
    assert moved.step_s > plain.step_s
    assert moved.traffic == plain.traffic
    for before, after, kept in zip(
        plain.memory_bytes, moved.memory_bytes, moved.host_bytes, strict=True
    ):
        assert after["optimizer"] == 0
        assert {**after, "optimizer": before["optimizer"]} == before
        # The host keeps what is updated, its gradients and both moments.
        assert kept == 2 * before["optimizer"] > 0
    assert moved.host_limit_bytes == 256 * GIB  # an eighth of 2 TiB


@pytest.mark.parametrize("strategy", ["fsdp", "hsdp", "fsdp-tp"])
def test_parameters_on_the_host_leave_only_what_is_gathered(strategy, tiny, eight) -> None:
    plain = predicted(planner.make(tiny, eight, strategy, num_ranks=4))
    states = predicted(planner.make(tiny, eight, strategy, offload="optimizer", num_ranks=4))
    moved = predicted(planner.make(tiny, eight, strategy, offload="parameters", num_ranks=4))
    assert moved.step_s > plain.step_s
    assert moved.traffic == plain.traffic
    assert moved.peak_bytes < states.peak_bytes < plain.peak_bytes
    assert moved.memory_bytes[0]["parameters"] == moved.memory_bytes[0]["optimizer"] == 0
    assert moved.host_bytes == states.host_bytes


def test_copies_run_beside_the_backward_and_a_slower_bus_shows(tiny, eight) -> None:
    """Gradients of the last blocks go down while the first ones' are computed."""
    plan = planner.make(tiny, eight, "dp", offload="optimizer", num_ranks=2)
    run = predict.simulated(plan, tiny, eight)
    spans = {task.label: (start_s, end_s) for task, start_s, end_s in run.tasks}
    backward_ends_s = max(
        end_s for task, _, end_s in run.tasks if task.stream == "compute" and task.seconds
    )
    last = spans["gradients of blocks.3 to the host"]
    assert last[0] < backward_ends_s
    assert spans["update"][0] >= spans["gradients of root to the host"][1]
    slow = replace(
        eight,
        groups=tuple(
            replace(g, node=replace(g.node, device=replace(g.node.device, host_bandwidth=1e9)))
            for g in eight.groups
        ),
    )
    assert predict.simulated(plan, tiny, slow).step_s > run.step_s


def test_ranks_of_a_machine_share_its_host(tiny, eight) -> None:
    """Four ranks on one host take longer to update than one on it, of the same machine."""
    alone = planner.make(tiny, eight, "dp", offload="optimizer", num_ranks=1)
    four = planner.make(tiny, eight, "dp", offload="optimizer", num_ranks=4)
    seconds = [
        next(
            task.seconds
            for task, _, _ in predict.simulated(plan, tiny, eight).tasks
            if task.label == "update"
        )
        for plan in (alone, four)
    ]
    assert 2 * seconds[0] < seconds[1] < 4.1 * seconds[0]


def test_on_a_cpu_nothing_is_saved(tiny, two_ranks) -> None:
    plain = predicted(planner.make(tiny, two_ranks, "fsdp"))
    same = predicted(planner.make(tiny, two_ranks, "fsdp", offload="parameters"))
    copied = predicted(planner.make(tiny, two_ranks, "fsdp", offload="optimizer"))
    assert same == plain
    assert copied.peak_bytes > plain.peak_bytes
    assert copied.host_bytes == ()


def test_a_host_that_is_too_small_is_said(tiny, two) -> None:
    (group,) = two.groups
    host = replace(group.node.host, memory_bytes=2**21)
    small = replace(two, groups=(replace(group, node=replace(group.node, host=host)),))
    with pytest.raises(InfeasibleError, match=r"on the host, whose part .* is 1 MiB"):
        planner.make(tiny, small, "dp", offload="optimizer")
    none = replace(two, groups=(replace(group, node=replace(group.node, host=None)),))
    with pytest.raises(UsageError, match="has no host to offload to"):
        planner.make(tiny, none, "dp", offload="optimizer")


@pytest.mark.parametrize("name", sorted(builtin().hosts))
def test_every_host_is_a_machines_and_says_whose_figures_it_has(name) -> None:
    host = builtin().host(name)
    assert len(host.source) > 40
    assert any(node.host is host for node in builtin().machines.values())


def test_what_no_rung_runs_is_refused_with_what_to_do(tiny, two_ranks, tmp_path) -> None:
    for strategy, says in (("zero-1", "shard_optimizer"), ("1f1b", "not at all")):
        with pytest.raises(InfeasibleError, match=says) as caught:
            planner.make(tiny, two_ranks, strategy, offload="parameters")
        assert "offload the optimizer alone" in str(caught.value)
    fsdp = replace(library.find("fsdp")(tiny, two_ranks), offload="parameters")
    check.check(fsdp)
    split = replace(fsdp, splits=(Split("blocks.*.feed_forward.up", "n", None, 2),))
    with pytest.raises(FormatError, match="under FSDP2 alone, not with splits"):
        check.check(split)
    plan = replace(library.find("dp")(tiny, two_ranks), offload="parameters")
    io.save(plan, tmp_path / "plan.json")
    with pytest.raises(FormatError, match="parameters on the host are shards"):
        io.load(tmp_path / "plan.json")


def test_a_plan_file_without_the_key_offloads_nothing(tiny, two_ranks) -> None:
    plan = planner.make(tiny, two_ranks, "dp")
    body = io.to_body(plan)
    del body["offload"], body["prediction"]["host_bytes"], body["prediction"]["host_limit_bytes"]
    assert io.from_body(body, where="old") == plan
    with pytest.raises(FormatError, match="offload"):
        io.from_body({**body, "offload": "everything"}, where="new")


def test_diff_explain_and_export_tell_of_it(tiny, eight) -> None:
    plain = planner.make(tiny, eight, "fsdp")
    moved = planner.make(tiny, eight, "fsdp", offload="optimizer")
    changes = {change.what: (change.first, change.second) for change in diff.diff(plain, moved)}
    assert changes["on the host"] == (None, "optimizer")
    found = explain.explain(moved, tiny, eight)
    assert found.offload.startswith("optimizer on the host: 1.7 MiB of 256 GiB a device; copies")
    assert "NVIDIA DGX H100 and H200 datasheets" in found.offload
    assert explain.explain(plain, tiny, eight).offload == ""
    with pytest.raises(UsageError, match="updates on the host what stays on the device"):
        export.export(moved, "torchtitan", {})
    shards = replace(plain, offload="parameters")
    assert "enable_cpu_offload = true" in export.export(shards, "torchtitan", {}).files[
        "torchtitan.toml"
    ].lower()  # fmt: skip


def test_the_command_line_makes_shows_and_explains_it(tmp_path) -> None:
    path = tmp_path / "plan.json"

    def run(*arguments: object):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    made = run(
        "make", "gpt-tiny", "--strategy", "fsdp", "--cluster", "h100x2", "--batch", 4, "--tokens",
        16, "--offload", "parameters", "-o", path,
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "parameters, gradients, the optimizer's states and update" in made.output
    assert "memory of its host" in made.output
    assert io.load(path).offload == "parameters"
    assert "parameters on the host: 6.8 MiB" in run("explain", path).output
    wrong = run("make", "gpt-tiny", "--offload", "all", "-o", path)
    assert wrong.exception is not None
    assert "offload" in str(wrong.exception)
