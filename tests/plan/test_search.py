"""The whole search: what it finds, what it obeys, what it says when nothing fits."""

from __future__ import annotations

import itertools
import json
import math

import pytest

from toolkit.errors import InfeasibleError, UsageError
from toolkit.hardware import find_cluster
from toolkit.plan import check, library, predict, subject
from toolkit.plan.order import families
from toolkit.plan.search import Constraints, constraints, search
from toolkit.plan.search.finalists import written
from toolkit.plan.search.found import _infeasible
from toolkit.plan.search.inter_op import cut
from toolkit.plan.search.outer import Outer
from toolkit.plan.search.schedules import alive, timed

MIB = 2**20


@pytest.fixture(scope="module")
def gpt(request):
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(request.path.parent))
    traced = subject.load("search_models:eight_layers", batch=32, dtype="bfloat16")
    patch.undo()
    return traced


@pytest.fixture(scope="module")
def large():
    """What is worth splitting inside operators."""
    return subject.load("gpt3-6.7b", batch=4, tokens=2048, dtype="bfloat16")


@pytest.fixture(scope="module")
def eight():
    return find_cluster("h100x8")


def outer(traced, cluster, limit=math.inf, looks=math.inf, **wanted) -> Outer:
    """A search that ends after so many looks at its clock, one for each ground it takes up."""
    count = itertools.count()
    return Outer(
        traced, cluster, cluster.num_devices, limit, Constraints(**wanted), None,
        looks, lambda _doing, _best: None, clock=lambda: float(next(count)),
    )  # fmt: skip


def test_little_time_finds_something_where_only_small_microbatches_fit(eight) -> None:
    """What is most promising has large microbatches: four looks in that order found nothing."""
    traced = subject.load("gpt-tiny", batch=256, tokens=64)
    wanted = {"splits": ["regions"], "schedules": ["1f1b"], "parameters": ["replicate"]}
    single = outer(traced, eight, microbatch_size=1, **wanted)
    single.run()
    least = min(one.peak_bytes for one in single.frontier.members)
    hurried = outer(traced, eight, 2 * least, looks=4, recompute=["all"], **wanted)
    hurried.run()
    assert hurried.stopped
    assert hurried.frontier.best is not None


def test_a_search_that_ran_out_of_time_says_so(gpt, eight) -> None:
    unfinished = outer(gpt, eight)
    assert "no schedule runs" in str(_infeasible(unfinished, math.inf))
    unfinished.stopped = True
    said = str(_infeasible(unfinished, math.inf))
    assert "in the time given" in said
    assert "more time" in said


def test_the_plan_is_checked_predicted_and_no_slower_than_any_library_plan(gpt, eight) -> None:
    found = search(gpt, eight)
    check.check(found.plan)
    assert found.complete
    assert found.plan.num_ranks == 8
    step_s = found.plan.prediction.step_s
    assert step_s == pytest.approx(found.best.step_s, rel=0.05)
    for name in ("dp", "fsdp", "zero-1", "tp", "1f1b"):
        try:
            made = library.find(name)(gpt, eight, num_ranks=8)
        except InfeasibleError:
            continue
        assert step_s <= predict.predict(made, gpt, eight).prediction.step_s * 1.001


@pytest.mark.parametrize(
    ("wanted", "tolerance"),
    [
        ({"data": 8, "recompute": ["needed"]}, 0.001),
        ({"pipeline": 2, "data": 4, "schedules": ["1f1b", "zb-v"], "microbatches": 4}, 0.04),
        ({"pipeline": 2, "data": 2, "tensor": 2, "native": True, "microbatches": 4}, 0.04),
        ({"data": 2, "tensor": 4, "native": True, "microbatches": 2}, 0.08),
    ],
)
def test_estimates_agree_with_predictions(gpt, eight, wanted, tolerance) -> None:
    """Time within the tolerance, memory within 30 %: one sum of parts against a walk over time."""
    doing = outer(gpt, eight, **wanted)
    seen = []
    keep = doing.frontier.add
    doing.frontier.add = lambda one: seen.append(one) or keep(one)
    doing.run()
    assert seen
    for candidate in seen[:12]:
        prediction = written(candidate, doing).prediction
        assert candidate.step_s == pytest.approx(prediction.step_s, rel=tolerance)
        assert candidate.peak_bytes == pytest.approx(prediction.peak_bytes, rel=0.3)


@pytest.mark.parametrize(
    "wanted",
    [
        {"data": 16, "parameters": ["shard"], "microbatches": 1},
        {"data": 16, "parameters": ["shard_optimizer", "shard_gradients"], "microbatches": 2},
        {"pipeline": 2, "data": 8, "parameters": ["shard_optimizer"], "schedules": ["1f1b"],
         "microbatches": 4, "replica": 2},
    ],
)  # fmt: skip
def test_parameters_are_sharded_in_groups_as_predicted(gpt, wanted) -> None:
    """Hybrid sharding: inside each of two machines, or as constraints say."""
    doing = outer(gpt, find_cluster("2xdgx-h100"), context=1, native=True, **wanted)
    seen = []
    keep = doing.frontier.add
    doing.frontier.add = lambda one: seen.append(one) or keep(one)
    doing.run()
    grouped = [one for one in seen if one.mesh.replica == 2]
    assert grouped
    assert len(grouped) == len(seen) if "replica" in wanted else len(grouped) < len(seen)
    for candidate in grouped[:4]:
        assert candidate.mesh.replica * candidate.mesh.data == wanted["data"]
        plan = written(candidate, doing)
        check.check(plan)
        assert plan.size("replica") == 2
        # Added up, a group's scatter and its sum hold up the next gather; simulated, they need not.
        assert candidate.step_s == pytest.approx(plan.prediction.step_s, rel=0.08)
        assert candidate.peak_bytes == pytest.approx(plan.prediction.peak_bytes, rel=0.3)


def test_groups_are_taken_where_the_network_between_machines_is_slow(gpt) -> None:
    cluster = find_cluster("2xdgx-h100")
    wanted = {"pipeline": 1, "context": 1, "tensor": 1, "parameters": ["shard"], "plans": []}
    found = search(gpt, cluster, constraints=Constraints(**wanted))
    assert found.plan.size("replica") == 2
    alone = search(gpt, cluster, constraints=Constraints(**wanted, replica=1))
    assert alone.plan.size("replica") == 1
    assert found.plan.prediction.step_s < alone.plan.prediction.step_s


def test_pruning_loses_nothing(gpt, eight) -> None:
    """The best of a search that looks at everything, one ground after another."""
    wanted = {"max_context": 1, "native": True}
    pruned = outer(gpt, eight, **wanted)
    pruned.run()
    assert pruned.pruned
    every = outer(gpt, eight, **wanted)
    for ground in every.space.grounds():
        every.look_at(ground, math.inf)
    best_s = every.frontier.best.step_s
    assert pruned.frontier.best.step_s == pytest.approx(best_s, rel=1e-9)


# Spaces as recipes/bench/plan_superscaler.py has them, and the one that holds them all.
SUB_SPACES = {
    "zero": {
        "pipeline": 1, "context": 1, "splits": ["regions"],
        "parameters": ["shard_optimizer", "shard_gradients", "shard"],
    },
    "megatron": {
        "context": 1, "splits": ["regions"], "schedules": ["1f1b", "interleaved"],
        "parameters": ["replicate", "shard_optimizer"],
    },
    "alpa": {"splits": ["searched"], "schedules": ["1f1b"], "parameters": ["replicate"]},
}  # fmt: skip


@pytest.mark.parametrize("space", SUB_SPACES)
def test_the_whole_space_is_no_worse_than_a_smaller_one_that_had_as_long(gpt, eight, space) -> None:
    """Known splits of all grounds come first: as many looks as there are of those, and what the
    smaller space took, are enough.
    """
    limit = 130 * MIB
    smaller = outer(gpt, eight, limit, runnable=False, **SUB_SPACES[space])
    smaller.run()
    whole = {"splits": ["regions", "searched"], "runnable": False}
    num_known = len(list(outer(gpt, eight, limit, **whole).space.grounds()))
    looks = num_known if space != "alpa" else num_known + smaller.clock()
    larger = outer(gpt, eight, limit, looks=looks, **whole)
    larger.run()
    assert larger.frontier.best.step_s <= smaller.frontier.best.step_s * (1 + 1e-9)


def test_stages_may_have_to_be_equal(gpt, eight) -> None:
    wanted = {"pipeline": 4, "data": 2, "schedules": ["1f1b"], "parameters": ["replicate"]}
    found = search(gpt, eight, constraints=Constraints(**wanted, equal_stages=True))
    assert [len(stage.blocks) for stage in found.plan.stages] == [2, 2, 2, 2]
    free = search(gpt, eight, constraints=Constraints(**wanted))
    assert free.best.step_s <= found.best.step_s


def test_less_memory_costs_time_and_is_obeyed(gpt, eight) -> None:
    free = search(gpt, eight)
    limit = 0.5 * free.best.peak_bytes
    tight = search(gpt, eight, memory_limit_bytes=limit)
    assert tight.plan.prediction.peak_bytes <= limit
    assert tight.plan.prediction.step_s >= free.plan.prediction.step_s
    assert tight.plan.prediction.memory_limit_bytes == int(limit)


def test_the_frontier_trades_time_for_memory(gpt, eight) -> None:
    found = search(gpt, eight)
    steps = [one.step_s for one in found.frontier]
    sizes = [one.peak_bytes for one in found.frontier]
    assert steps == sorted(steps)
    assert sizes == sorted(sizes, reverse=True)
    assert len(found.frontier) > 2
    assert found.runner_up is not found.best


def test_what_nothing_fits_says_what_is_nearest(gpt, eight) -> None:
    with pytest.raises(InfeasibleError) as caught:
        search(gpt, eight, memory_limit_bytes=2 * MIB)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert "nearest" in message
    assert "too much" in message
    assert "2 MiB" in message


def test_batches_that_do_not_divide_say_so(eight) -> None:
    odd = subject.load("gpt-tiny", batch=7, tokens=32)
    with pytest.raises(InfeasibleError, match="batch 7 does not divide"):
        search(odd, eight, constraints=Constraints(data=8))


def test_constraints_are_obeyed(gpt, eight) -> None:
    found = search(
        gpt,
        eight,
        constraints=Constraints(
            pipeline=2, schedules=["gpipe"], parameters=["shard_optimizer"], data=4
        ),
    )
    assert found.best.mesh == (2, 1, 4, 1, 1)
    assert found.plan.schedule == "gpipe"
    assert found.plan.placed("shard_optimizer")


@pytest.mark.parametrize("way", ["shard_gradients", "shard"])
def test_what_no_rung_runs_is_not_found_unless_asked(gpt, eight, way) -> None:
    wanted = {"pipeline": 2, "data": 4, "tensor": 1, "parameters": [way], "plans": []}
    with pytest.raises(InfeasibleError):
        search(gpt, eight, constraints=Constraints(**wanted))
    found = search(gpt, eight, constraints=Constraints(**wanted, runnable=False))
    assert found.plan.placed(way)


def test_modules_that_must_stay_whole_do(large, eight) -> None:
    found = search(
        large, eight,
        constraints=Constraints(tensor=8, replicated=["blocks.*.ffn"], microbatches=1),
    )  # fmt: skip
    assert found.plan.splits
    assert not [split for split in found.plan.splits if ".ffn." in split.ops]


def test_constraint_files_name_what_is_wrong(tmp_path) -> None:
    good = tmp_path / "c.toml"
    good.write_text('max_pipeline = 2\nschedules = ["1f1b"]\n')
    assert constraints.load(good) == Constraints(max_pipeline=2, schedules=["1f1b"])
    bad = tmp_path / "c.json"
    bad.write_text(json.dumps({"max_pipelin": 2}))
    with pytest.raises(UsageError, match="did you mean 'max_pipeline'"):
        constraints.load(bad)
    with pytest.raises(UsageError, match="did you mean '1f1b'"):
        Constraints(schedules=["1f1"])


def test_fast_devices_get_more_blocks() -> None:
    """V100s beside H100s: stages as long as each other, not as large."""
    mixed = find_cluster("v100x1+h100x1")
    slow, fast = mixed.device(0), mixed.device(1)
    times = {0: 1.0, 1: 0.5}
    assert slow.name != fast.name
    import numpy as np

    def matrix(cls):
        return np.array(
            [[(j - i) * times[cls] if j > i else np.inf for j in range(7)] for i in range(7)]
        )

    found = cut(lambda stage, cls: matrix(cls), 6, [1, 1], 16)
    held = dict(zip(found.classes, np.diff((*found.begins, 6)), strict=True))
    assert held == {0: 2, 1: 4}


def test_mixed_clusters_are_planned() -> None:
    traced = subject.load("gpt-mini", batch=16, tokens=256, dtype="float16")
    mixed = find_cluster("v100x1+h100x1")
    wanted = Constraints(pipeline=2, schedules=["1f1b"], microbatches=8)
    found = search(traced, mixed, constraints=wanted)
    check.check(found.plan)
    blocks = {stage.devices[0]: len(stage.blocks) for stage in found.plan.stages}
    assert blocks[1] > blocks[0]
    assert found.best.step_s == pytest.approx(found.plan.prediction.step_s, rel=0.05)


def test_time_limits_are_kept_and_progress_is_told(gpt, eight) -> None:
    told = []
    found = search(gpt, eight, time_limit_s=0.2, progress=lambda doing, best: told.append(doing))
    assert told
    assert not found.complete


@pytest.mark.parametrize("family", ["1f1b", "gpipe", "interleaved", "zb-h1", "zb-v", "dualpipe-v"])
def test_long_schedules_are_timed_by_shorter_ones(family) -> None:
    from toolkit.plan.order.clock import run
    from toolkit.plan.order.pipeline import Stage

    p, m = 8, 96
    order = families.build(family, p, m)
    stages = [Stage(1 + 0.1 * (s % 3), 1, 0.8) for s in range(len(order.placement))]
    exact = run(order, stages, delay=0.05)
    length = max(exact.ends)
    delays = [0.05] * (len(stages) - 1)
    assert timed(family, m, stages, delays, p).length_s == pytest.approx(length, rel=0.01)


def test_what_is_alive_is_what_the_tables_say() -> None:
    assert [one.most(d)[0] for d, one in enumerate(alive("1f1b", 4, 16))] == [4, 3, 2, 1]
    assert [one.most(d)[0] for d, one in enumerate(alive("gpipe", 4, 16))] == [16] * 4
    assert alive("zb-h1", 4, 16)[3].most(3)[1] > 0


def test_a_plan_of_splits_names_operators_of_every_block(large, eight) -> None:
    from toolkit.plan.program import select

    doing = outer(large, eight, tensor=8, microbatches=1)
    doing.run()
    candidates = [one for one in doing.frontier.fastest if one.split.startswith("operators")]
    plan = written(candidates[0], doing)
    assert 0 < len(plan.splits) < 60
    assert {split.axis for split in plan.splits} == {"tensor"}
    graph = large.graph.at(batch=plan.microbatch)
    for split in plan.splits:
        assert select.ops(graph, [split.ops])
    check.check(plan)
