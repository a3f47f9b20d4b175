"""Plans over replica, data and tensor axes that no library file writes, and the pieces of ZeRO."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import UsageError
from toolkit.hardware import find_cluster
from toolkit.plan import io, library, planner, predict, verify
from toolkit.plan.lower import groups, ladder, native
from toolkit.plan.lower.piece import boxes
from toolkit.plan.plan import Axis, Placement, Plan, Split, Stage


def as_placed(plan: Plan, how) -> Plan:
    """The plan with every unit over the data axis placed `how`."""
    placements = tuple(
        replace(entry, how=how) if entry.axis == "data" else entry for entry in plan.placements
    )
    return replace(plan, strategy=f"{plan.strategy}, {how}", placements=placements)


@pytest.mark.slow
def test_ways_of_the_data_axis_over_tensor_and_over_replica(tiny, tmp_path: Path) -> None:
    cluster = find_cluster("cpux4")
    paths = []
    wanted = {
        "hsdp": ("shard_gradients", "shard"),
        "fsdp-tp": ("replicate", "shard_optimizer", "shard"),
    }
    for strategy, ways in wanted.items():
        plan = library.find(strategy)(tiny, cluster, microbatches=2, recompute=True)
        for how in ways:
            paths.append(tmp_path / f"{len(paths)}.json")
            io.save(predict.predict(as_placed(plan, how), tiny, cluster), paths[-1])
    for report in verify.verify(paths):
        assert report.holds, report
        assert report.rung.startswith("native: ")


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_boxes_are_consecutive_elements_in_order(shape: list[int], data: st.DataObject) -> None:
    count = math.prod(shape)
    start = data.draw(st.integers(0, count))
    end = data.draw(st.integers(start, count))
    whole = torch.arange(count).view(shape)
    found: list[int] = []
    made = list(boxes(shape, start, end))
    for offsets, sizes, before in made:
        assert before == len(found)
        box = tuple(slice(o, o + size) for o, size in zip(offsets, sizes, strict=True))
        found += whole[box].flatten().tolist()
    assert found == list(range(start, end))
    assert len(made) <= max(1, 2 * len(shape) - 1)


@pytest.fixture(scope="module")
def cube() -> Plan:
    return Plan(
        "cube", provenance=None, mesh=(Axis("replica", 2), Axis("data", 2), Axis("tensor", 2)),
        placements=(), stages=(Stage(None, ()),), microbatches=1, schedule="1f1b", order=((),),
    )  # fmt: skip


def test_who_meets_whom_and_who_sees_what(cube: Plan) -> None:
    assert groups.members(cube, ("replica", "data"), 3) == (1, 3, 5, 7)
    assert groups.members(cube, ("tensor",), 5) == (4, 5)
    assert [groups.replica(cube, rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_ladder_picks_a_rung(cube: Plan) -> None:
    pipeline = (Axis("pipeline", 2), Axis("data", 2))
    both = (Stage(None, ()), Stage("b", (), (1,)))
    assert ladder.rung(cube) == "native"
    assert ladder.rung(replace(cube, mesh=pipeline, stages=both)) == "schedule"
    for program in (
        replace(cube, mesh=(*pipeline, Axis("tensor", 2)), stages=both),
        replace(cube, mesh=pipeline, stages=(Stage(None, (), (0, 1)), *both)),
        replace(cube, mesh=pipeline, stages=(Stage(None, (), no_grad=True), *both)),
        replace(cube, splits=(Split("up", "n", "tensor"),)),
    ):
        assert ladder.rung(program) == "program"


def test_what_the_native_rung_cannot_run_is_said(cube: Plan) -> None:
    mixed = (Placement("a", "data", "replicate"), Placement("", "data", "shard"))
    with pytest.raises(UsageError, match="replicate and shard"):
        native.check_ways(replace(cube, placements=mixed))
    with pytest.raises(UsageError, match="4 replicas train, and no module says"):
        native.check_ways(cube)
    with pytest.raises(UsageError, match="runs no context"):
        native.lower(replace(cube, mesh=(Axis("context", 2),)), None, None, None, {})


@pytest.mark.parametrize("strategy", ["hsdp", "fsdp-tp"])
def test_two_ranks_make_no_mesh_of_two_axes(strategy: str, tiny, two_ranks) -> None:
    from toolkit.errors import InfeasibleError

    with pytest.raises(InfeasibleError, match="4 or more ranks"):
        planner.make(tiny, two_ranks, strategy)
