from __future__ import annotations

from dataclasses import replace

import pytest

from toolkit.errors import InfeasibleError
from toolkit.hardware import find_cluster
from toolkit.plan import flops, library, planner, predict, subject


def traffic(plan) -> dict[tuple[int, str], int]:
    return {(row.position, row.kind): row.count for row in plan.prediction.traffic}


def test_counts_known_from_torch_on_four_blocks(toys, two_ranks) -> None:
    """Four forward and three backward all-reduces; eight gathers and four scatters."""
    traced = subject.load("toy_models:chain", batch=4)
    assert traffic(planner.make(traced, two_ranks, "tp")) == {(0, "all_reduce"): 7}
    assert traffic(planner.make(traced, two_ranks, "fsdp")) == {
        (0, "all_gather"): 8,
        (0, "reduce_scatter"): 4,
    }


def test_memory_follows_what_is_divided(tiny, two_ranks) -> None:
    dp, fsdp = (planner.make(tiny, two_ranks, name).prediction for name in ("dp", "fsdp"))
    held = sum(tensor.num_bytes for tensor in tiny.graph.parameters())
    assert dp.memory_bytes[0]["parameters"] == held
    assert dp.memory_bytes[0]["optimizer"] == 2 * held
    assert fsdp.memory_bytes[0]["parameters"] == held // 2
    stages = planner.make(tiny, two_ranks, "1f1b").prediction.memory_bytes
    assert sum(entries["parameters"] for entries in stages) == held


def test_recompute_trades_time_for_activations(tiny, two_ranks) -> None:
    for name in ("dp", "fsdp", "tp"):
        plain = planner.make(tiny, two_ranks, name).prediction
        again = planner.make(tiny, two_ranks, name, recompute=True).prediction
        assert again.step_s > plain.step_s
        assert again.memory_bytes[0]["activations"] < plain.memory_bytes[0]["activations"]
        assert again.model_flops == plain.model_flops


def test_model_flops_are_three_times_forward_less_the_first_input(tiny) -> None:
    """Every Linear reads an activation that needs a gradient, so backward is exactly twice."""
    linears = [op for op in tiny.graph.ops if op.kind == "aten.linear"]
    forward = sum(
        2 * tiny.graph.tensors[op.inputs[0]].numel * tiny.graph.tensors[op.inputs[1]].shape[0]
        for op in linears
    )
    assert flops.model_flops(tiny.graph) > 3 * forward
    attention = flops.model_flops(tiny.graph) - 3 * forward
    assert attention < 0.2 * forward


def test_the_simulated_step_is_the_predicted_one_and_its_timeline_is_marked(
    tiny, two_ranks
) -> None:
    made = 0
    for name in library.STRATEGIES:
        try:
            plan = planner.make(tiny, two_ranks, name, microbatches=2)
        except InfeasibleError:  # not a plan for two ranks
            continue
        made += 1
        run = predict.simulated(plan, tiny, two_ranks)
        assert run.step_s == plan.prediction.step_s
        timeline = run.timeline("one step")
        assert {span.source for span in timeline.spans} == {"predicted"}
        assert timeline.duration_s == pytest.approx(run.step_s)
        assert 0 < plan.prediction.mfu < 1
        assert 0 <= plan.prediction.bubble < 1
    assert made >= 6


def test_slower_links_cost_the_plans_that_use_them(tiny) -> None:
    """Four GPUs in one machine against one in each of four."""
    near, far = find_cluster("h100x4"), find_cluster("4xh100x1")
    for name in ("dp", "fsdp", "tp"):
        one = planner.make(tiny, near, name).prediction
        other = planner.make(tiny, far, name).prediction
        assert other.step_s > one.step_s
        assert other.traffic == one.traffic


def test_auto_keeps_the_fastest_and_says_why_others_are_out(tiny, two_ranks) -> None:
    best = planner.choose(tiny, two_ranks)
    assert all(best.prediction.step_s <= other.step_s for other in best.considered if other.step_s)
    eight = find_cluster("h100x8")
    best = planner.choose(tiny, eight)
    reasons = {other.description: other.reason for other in best.considered}
    assert "does not divide 4" in reasons["tp"]
    assert "8 pipeline stages do not fit the 4 blocks" in reasons["1f1b"]
    assert best.strategy in ("dp", "fsdp")


def test_what_cannot_be_done_says_what_can(tiny, two_ranks) -> None:
    for options, message in (
        ({"strategy": "1f1b", "microbatches": 3}, "batch 8 does not divide"),
        ({"strategy": "dp", "num_ranks": 4}, "needs 4 devices and cpux2 has 2"),
        ({"strategy": "dp", "memory_limit_bytes": 2**20}, "a rank at position 0 under dp needs"),
    ):
        with pytest.raises(InfeasibleError, match=message):
            planner.make(tiny, two_ranks, **options)
    with pytest.raises(InfeasibleError, match="no strategy fits gpt-tiny"):
        planner.choose(tiny, two_ranks, memory_limit_bytes=2**16)


def test_stages_of_a_large_model_are_balanced_with_the_head() -> None:
    """The head of a small GPT with a large vocabulary is work: its stage gets fewer blocks."""
    traced = subject.load("gpt2", batch=4, tokens=128)
    plan = planner.make(traced, find_cluster("h100x4"), "1f1b", microbatches=4)
    counts = [len(stage.blocks) for stage in plan.stages]
    assert sum(counts) == 12
    assert counts[-1] < counts[0]
    assert replace(plan, prediction=None).size("pipeline") == 4
