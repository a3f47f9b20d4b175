"""The own executor computes what one device does and communicates what was predicted, exactly."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from toolkit.errors import UsageError
from toolkit.hardware import find_cluster
from toolkit.plan import io, launch
from toolkit.plan.library import co_shard, context_parallel, grid, interlaced
from toolkit.plan.lower.program import local, write
from toolkit.plan.lower.program.walk import Walk
from toolkit.plan.plan import Split

sys.path.append(str(Path(__file__).parent))
from program_check import check


def test_plans_of_every_kind_on_two_ranks(tiny, two_ranks) -> None:
    """All in one start of the ranks, which costs more than they do."""
    plans = [
        grid.plan(tiny, two_ranks, tensor=2, microbatches=2, recompute=True),
        grid.plan(tiny, two_ranks, tensor=2, sequence=True),
        grid.plan(tiny, two_ranks, pipeline=2, microbatches=4, recompute=True),
        grid.plan(tiny, two_ranks, pipeline=1, microbatches=2),
        co_shard.plan(tiny, two_ranks, parts=2, microbatches=2),
        context_parallel.plan(tiny, two_ranks, microbatches=2),
        interlaced.plan(tiny, two_ranks, microbatches=4),
    ]
    for found in check(plans, tiny):
        assert found["parity"]["num_gradients"] == 69
        assert found["rung"] == "program: own executor"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_grids_of_four(tiny, dtype: str) -> None:
    cluster = find_cluster("cpux4")
    plans = [
        grid.plan(tiny, cluster, pipeline=2, tensor=2, microbatches=4, sequence=True),
        grid.plan(tiny, cluster, tensor=2, microbatches=2, recompute=True),
        grid.plan(tiny, cluster, pipeline=4, microbatches=4),
        grid.plan(tiny, cluster, pipeline=2, microbatches=2),
        grid.plan(tiny, cluster, pipeline=2, context=2, microbatches=2),
        grid.plan(tiny, cluster, tensor=2, context=2, microbatches=2),
    ]
    check(plans, tiny, dtype=dtype)


def test_a_checkpoint_is_resumed_under_another_plan(tiny, two_ranks, tmp_path: Path) -> None:
    """A vocabulary split over a pipeline's positions becomes whole, and layers are split."""
    plans = [
        interlaced.plan(tiny, two_ranks, microbatches=2),
        grid.plan(tiny, two_ranks, tensor=2),
    ]
    paths = [tmp_path / f"{index}.json" for index in range(2)]
    for plan, path in zip(plans, paths, strict=True):
        io.save(plan, path)
    script = str(Path(__file__).parent / "resume_ranks.py")
    launch.run([script, str(tmp_path / "saved"), *map(str, paths)], 2)


def test_the_program_written_is_one_that_can_run(tiny, two_ranks) -> None:
    """What is written passes the checks of any program: all views are made, nothing waits."""
    for plan in (
        grid.plan(tiny, two_ranks, tensor=2, sequence=True),
        grid.plan(tiny, two_ranks, pipeline=2),
        co_shard.plan(tiny, two_ranks, parts=2),
    ):
        frozen = write.write(plan, tiny.graph).frozen()
        assert {sub_op.op for sub_op in frozen.sub_ops} == {op.name for op in tiny.graph.ops}


def test_a_rank_sees_its_part_of_the_shapes(tiny, two_ranks) -> None:
    plan = grid.plan(tiny, two_ranks, tensor=2)
    found = local.local(Walk(plan, tiny.graph, two_ranks), 0, 1)
    assert found.graph.tensors["blocks.0.ffn.up.weight"].shape == (256, 128)
    assert found.graph.tensors["blocks.0.ffn.up:linear"].shape == (8, 32, 256)
    calls = [step for step in found.forward.steps if isinstance(step, local.Call)]
    assert {(call.kind, call.num_bytes) for call in calls} == {("all_reduce", 8 * 32 * 128 * 4)}
    assert len(calls) == 8


def test_what_cannot_run_is_refused(tiny, two_ranks) -> None:
    plan = grid.plan(tiny, two_ranks, pipeline=2, microbatches=2)
    backwards = tuple(tuple(reversed(row)) for row in plan.order)
    with pytest.raises(UsageError, match="this order cannot run"):
        Walk(replace(plan, order=backwards), tiny.graph, two_ranks)
    twice = (Split("blocks.*.ffn.up:linear", "n", "tensor"),
             Split("blocks.0.ffn.up:linear", "k", "tensor"))  # fmt: skip
    with pytest.raises(UsageError, match="split over tensor along n and along k"):
        Walk(replace(grid.plan(tiny, two_ranks, tensor=2), splits=twice), tiny.graph, two_ranks)
    with pytest.raises(UsageError, match=r"no operator runs in 'blocks\.9'"):
        Walk(replace(plan, recompute=("blocks.9",)), tiny.graph, two_ranks)


def test_what_only_a_forward_reads_does_not_run_again(tiny, two_ranks) -> None:
    """Of a recomputed block the linears that close its halves are left out, others are not."""
    plan = co_shard.plan(tiny, two_ranks, parts=2)
    backward = local.local(Walk(plan, tiny.graph, two_ranks), 0, 0).backward
    runs = zip(backward.steps, backward.again, strict=True)
    again = [step for step, twice in runs if twice and not isinstance(step, local.Call)]
    linears = {name for name, _ in again if "blocks.0." in name and name.endswith(":linear")}
    assert linears == {
        f"blocks.0.{path}:linear"
        for path in ("attention.query", "attention.key", "attention.value", "ffn.up")
    }
