"""Counting a step of ranks that are not there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from toolkit.errors import UsageError
from toolkit.hardware import find_cluster
from toolkit.plan import library, planner, predict, subject, verify
from toolkit.plan.library import sequence_parallel


def test_sixty_four_ranks_of_two_axes() -> None:
    traced = subject.load("gpt-tiny", batch=64, tokens=32)
    found = verify.dry_run(planner.make(traced, find_cluster("8xh100x8"), "fsdp-tp", tensor=2))
    assert found.holds, found.traffic
    assert found.num_ranks == 64
    assert {row.kind for row in found.traffic} == {"all_gather", "all_reduce", "reduce_scatter"}


@pytest.mark.slow
def test_a_thousand_ranks_of_a_seventy_billion_shape(toys) -> None:
    cluster = find_cluster("128xh100x8")
    traced = subject.load("big_models:llama70b_4_layers", dtype="bfloat16", batch=128, tokens=1024)
    plan = library.find("fsdp-tp")(traced, cluster, tensor=8)
    by_tokens = replace(
        plan, placements=(*plan.placements, *sequence_parallel.placed(traced, plan))
    )
    for made in (plan, by_tokens):
        found = verify.dry_run(predict.predict(made, traced, cluster))
        assert found.holds, found.traffic
        assert found.num_ranks == 1024
        assert found.process_bytes < 2 * 2**30


@pytest.mark.parametrize("strategy", ["dp", "zero-2", "hsdp", "tp-sp"])
@pytest.mark.slow
def test_other_ways(strategy: str) -> None:
    traced = subject.load("gpt-tiny", batch=16, tokens=32)
    ranks = 4 if strategy == "tp-sp" else 16
    plan = planner.make(traced, find_cluster("2xh100x8"), strategy, num_ranks=ranks, recompute=True)
    found = verify.dry_run(plan)
    assert found.holds, found.traffic


def test_stages_differ_by_rank_and_are_not_counted_on_one(tiny, two_ranks) -> None:
    with pytest.raises(UsageError, match="whose ranks differ"):
        verify.dry_run(planner.make(tiny, two_ranks, "1f1b"))
