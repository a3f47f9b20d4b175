"""Pipelines run by their own tables: what one device computes, in the plan's order, with the
messages that the cut implies.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from toolkit.errors import InfeasibleError, UsageError
from toolkit.hardware import find_cluster
from toolkit.plan import chain, launch, library, order, predict, subject
from toolkit.plan.library import pipeline
from toolkit.plan.lower import pipeline as lowering
from toolkit.plan.order import families, search
from toolkit.plan.order.action import Action
from toolkit.plan.order.pipeline import Stage
from toolkit.plan.plan import Placement, Plan

RANKS = Path(__file__).parent / "pipeline_ranks.py"
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipe-v")
TWO_A_POSITION = ("interleaved", "zb-v", "dualpipe-v")


def made(traced, strategy: str, *, ranks: int = 2, **keywords) -> Plan:
    return library.find(strategy)(traced, find_cluster(f"cpux{ranks}"), **keywords)


def run(plans: Sequence[Plan], folder: Path, *, dtype: str = "float32") -> list[dict]:
    """Run the plans on ranks and hold them to one device and to their tables."""
    paths = [folder / f"{index}.pickle" for index in range(len(plans))]
    for plan, path in zip(plans, paths, strict=True):
        path.write_bytes(pickle.dumps(plan))
    out = folder / "report.json"
    launch.run([str(RANKS), str(out), dtype, *map(str, paths)], plans[0].num_ranks)
    reports = json.loads(out.read_text())
    tolerance = {"float32": 1e-5, "float64": 1e-10}[dtype]
    for plan, report in zip(plans, reports, strict=True):
        assert report["rung"].startswith("schedule: ")
        assert report["loss_error"] <= tolerance, (plan.strategy, report)
        assert report["gradient_error"] <= tolerance, (plan.strategy, report)
        assert not report["missing"]
        for rank in report["ranks"]:
            assert rank["ran"] == [str(action) for action in plan.order[rank["position"]]]
    return reports


def messages(plan: Plan, traced: subject.Subject) -> dict[int, Counter]:
    """Sends and receives by position: one a microbatch, border between positions, direction and
    crossing tensor; (count, bytes).
    """
    graph = traced.graph.at(batch=plan.microbatch)
    found = {position: Counter() for position in range(plan.size("pipeline"))}
    for before, stage in zip(plan.stages, plan.stages[1:], strict=False):
        (sender,), (receiver,) = before.devices, stage.devices
        if sender == receiver:
            continue
        for tensor in chain.crossing(graph, stage.begins_at):
            for kind, other in (("send", "recv"), ("recv", "send")):
                for place, name in ((sender, kind), (receiver, other)):
                    found[place][name] += plan.microbatches
                    found[place][f"{name} bytes"] += plan.microbatches * tensor.num_bytes
    return found


def check_messages(plan: Plan, traced: subject.Subject, report: dict) -> None:
    wanted = messages(plan, traced)
    for rank in report["ranks"]:
        for kind in ("send", "recv"):
            count, num_bytes = rank["calls"][kind]
            assert count == wanted[rank["position"]][kind], plan.strategy
            assert num_bytes == wanted[rank["position"]][f"{kind} bytes"], plan.strategy


def check_predicted(plan: Plan, traced: subject.Subject, report: dict) -> None:
    cluster = find_cluster(f"cpux{plan.num_ranks}")
    prediction = predict.predict(plan, traced, cluster).prediction
    for rank in report["ranks"]:
        wanted = {
            row.kind: [row.count, row.num_bytes]
            for row in prediction.traffic
            if row.position == rank["position"]
        }
        assert rank["calls"] == wanted, (plan.strategy, rank["position"])


def test_every_schedule_is_run_in_its_own_order(tiny, tmp_path: Path) -> None:
    plans = [made(tiny, name) for name in SCHEDULES]
    for plan, report in zip(plans, run(plans, tmp_path), strict=True):
        check_messages(plan, tiny, report)
        assert report["num_gradients"] == 69
        held = [set(rank["held"]) for rank in report["ranks"]]
        assert held[0].isdisjoint(held[1])
        check_predicted(plan, tiny, report)
        assert [len(plan.held_stages(place)) for place in (0, 1)] == (
            [2, 2] if plan.strategy in TWO_A_POSITION else [1, 1]
        )


def test_what_no_input_leads_to_and_recomputation(toys, tmp_path: Path) -> None:
    """A parameter whose table later stages read, with backward in two halves."""
    traced = subject.load("toy_models:biased", batch=8)
    plans = [
        made(traced, name, recompute=recompute)
        for name in ("zb-v", "dualpipe-v")
        for recompute in (False, True)
    ]
    for plan, report in zip(plans, run(plans, tmp_path), strict=True):
        check_messages(plan, traced, report)
        check_predicted(plan, traced, report)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["swin-nano", "t5-tiny", "llama-tiny", "toy_models:evoformer"])
def test_other_families(model: str, toys, tmp_path: Path) -> None:
    """Several tensors a border; an encoder's output handed on; norms and biases of all kinds."""
    traced = subject.load(model, batch=8, **({"tokens": 16} if model == "llama-tiny" else {}))
    plans = [
        made(traced, name, recompute=recompute)
        for name, recompute in (
            ("1f1b", True), ("interleaved", False), ("zb-h1", True), ("zb-v", False),
            ("dualpipe-v", True),
        )
    ]  # fmt: skip
    for plan, report in zip(plans, run(plans, tmp_path), strict=True):
        check_messages(plan, traced, report)
        check_predicted(plan, traced, report)


@pytest.mark.slow
def test_tied_embeddings_meet_across_positions(toys, tmp_path: Path) -> None:
    traced = subject.load("toy_models:tied", batch=8)
    plans = [made(traced, name) for name in SCHEDULES]
    for plan, report in zip(plans, run(plans, tmp_path), strict=True):
        # In a V the head is where the embedding is.
        apart = plan.strategy not in ("zb-v", "dualpipe-v")
        for rank in report["ranks"]:
            assert ("all_reduce" in rank["calls"]) == apart


@pytest.mark.slow
def test_double_precision_agrees_to_1e_10(tiny, tmp_path: Path) -> None:
    run([made(tiny, name) for name in SCHEDULES], tmp_path, dtype="float64")


@pytest.mark.slow
def test_four_positions(toys, tmp_path: Path) -> None:
    traced = subject.load("toy_models:biased", batch=16)
    plans = [made(traced, name, ranks=4) for name in SCHEDULES]
    for plan, report in zip(plans, run(plans, tmp_path), strict=True):
        check_messages(plan, traced, report)
        check_predicted(plan, traced, report)


@pytest.mark.slow
def test_a_pipeline_on_every_replica(toys, tmp_path: Path) -> None:
    """Gradients of each unit are reduced once over data, and those of a tied embedding also over
    the positions that hold it.
    """
    traced = subject.load("toy_models:tied", batch=16)
    plans = [made(traced, name, ranks=4, data=2) for name in SCHEDULES]
    for plan, report in zip(plans, run(plans, tmp_path), strict=True):
        check_predicted(plan, traced, report)
        apart = plan.strategy not in ("zb-v", "dualpipe-v")
        for rank in report["ranks"]:
            # Two blocks a position, and what it holds of the root; the embedding once more
            # between the positions that hold it.
            root = any(not name.startswith("blocks.") for name in rank["held"])
            assert rank["calls"]["all_reduce"][0] >= 2 + root + apart, plan.strategy


@pytest.mark.slow
def test_the_update_of_a_stage_is_divided_over_its_replicas(toys, tmp_path: Path) -> None:
    """ZeRO-1 in each position. What several positions hold is all-reduced, not divided."""
    cluster = find_cluster("cpux4")
    names = ("1f1b", "interleaved", "zb-h1", "zb-v")
    for model in ("toy_models:biased", "toy_models:tied"):
        traced = subject.load(model, batch=16)
        plans = [
            pipeline.write(traced, cluster, name, data=2, how="shard_optimizer") for name in names
        ]
        for plan, report in zip(plans, run(plans, tmp_path), strict=True):
            if model == "toy_models:biased":
                check_predicted(plan, traced, report)
            apart = model == "toy_models:tied" and plan.strategy != "zb-v"
            for rank in report["ranks"]:
                assert rank["calls"]["reduce_scatter"][0] >= 2
                assert rank["calls"].get("all_reduce", [0])[0] == 2 * apart


@pytest.mark.slow
def test_schedules_without_a_strategy_of_their_own(tiny, tmp_path: Path) -> None:
    """Looped BFS, ZB-H2, a table that a search found, and one that takes microbatches in any
    order.
    """
    cluster = find_cluster("cpux2")
    plans = [pipeline.write(tiny, cluster, name) for name in ("looped-bfs", "zb-h2")]
    vee = ((0,), (1,), (1,), (0,))
    found = search.search(order.chain(vee, Stage(), split=True), 4)
    plans.append(pipeline.follow(tiny, cluster, order.Order("found", vee, 4, found.schedule.rows)))
    gpipe = families.build("gpipe", 2, 4)
    turned = {0: 2, 1: 0, 2: 3, 3: 1}
    rows = tuple(
        tuple(action._replace(microbatch=turned[action.microbatch]) for action in row)
        for row in gpipe.rows
    )
    plans.append(pipeline.follow(tiny, cluster, replace(gpipe, rows=rows)))
    assert plans[-1].order[1][0] == Action(1, "F", 2)
    run(plans, tmp_path)


def test_microbatches_that_a_schedule_can_run_are_chosen() -> None:
    traced = subject.load("gpt-tiny", batch=12, tokens=16)
    assert made(traced, "1f1b").microbatches == 6
    assert made(traced, "interleaved").microbatches == 6
    assert made(traced, "dualpipe-v").microbatches == 6
    with pytest.raises(InfeasibleError, match="at least 4 microbatches"):
        made(traced, "dualpipe-v", microbatches=2)
    with pytest.raises(InfeasibleError, match="groups of the 2 devices"):
        made(traced, "interleaved", microbatches=3)
    with pytest.raises(InfeasibleError, match="8 pipeline stages do not fit the 4 blocks"):
        made(traced, "zb-v", ranks=4)
    with pytest.raises(InfeasibleError, match="4 ranks do not make pipelines with 3 ranks"):
        made(traced, "1f1b", ranks=4, data=3)


def test_what_this_rung_cannot_run_is_named(tiny) -> None:
    plan = made(tiny, "1f1b")
    with pytest.raises(UsageError, match="stage 1"):
        lowering.check(
            replace(plan, stages=(plan.stages[0], replace(plan.stages[1], no_grad=True)))
        )
    with pytest.raises(UsageError, match="column"):
        lowering.check(replace(plan, placements=(Placement("blocks.0", "tensor", "column"),)))
    swapped = (plan.order[0][::-1], plan.order[1])
    with pytest.raises(UsageError, match=r"cannot run: .* waits for .* a circle"):
        lowering.check(replace(plan, order=swapped))
