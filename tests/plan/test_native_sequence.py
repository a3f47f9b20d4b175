"""Activations split by tokens: where the split is found, and that what is run is right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from toolkit.errors import InfeasibleError, UsageError
from toolkit.hardware import find_cluster
from toolkit.plan import chain, io, library, planner, predict, sequence, subject, transform, verify
from toolkit.plan.library import sequence_parallel
from toolkit.plan.lower import native


def runs(traced):
    regions = transform.regions(traced.graph, chain.segments(traced.graph), 2)
    return sequence.runs(traced.graph, regions, 2)


def test_one_run_through_all_blocks_of_a_gpt(tiny) -> None:
    (run,) = runs(tiny)
    assert run.blocks == tuple(f"blocks.{i}" for i in range(4))
    assert run.modules == run.blocks
    assert [inner.module for inner in run.inside[:2]] == ["blocks.0.attention", "blocks.0.ffn"]
    names = {tensor.fqn for tensor in run.partial}
    norms = ("attention_norm.weight", "attention_norm.bias", "ffn_norm.weight", "ffn_norm.bias")
    assert names == {f"{block}.{norm}" for block in run.blocks for norm in norms}


def test_an_encoder_and_a_decoder_are_two_runs_and_biased_attention_is_whole() -> None:
    encoder, decoder = runs(subject.load("t5-tiny", batch=2, tokens=8, source_tokens=8))
    assert encoder.blocks == ("encoder.blocks.0", "encoder.blocks.1")
    assert {inner.module for inner in decoder.inside if inner.region is None} == {
        f"decoder.blocks.{i}.{name}" for i in (0, 1) for name in ("attention", "cross")
    }
    assert all("norm" in (tensor.fqn or "") for tensor in decoder.partial)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("swin-nano", r"its activations are \[2, 8, 8, 32\]"),
        ("toolkit.plan.verify.matrix:evoformer_one_pass", "hands on 2 tensors"),
    ],
)
def test_what_cannot_be_split_by_tokens_says_why(model: str, why: str, two_ranks) -> None:
    with pytest.raises(InfeasibleError, match=why):
        planner.make(subject.load(model, batch=2), two_ranks, "tp-sp")


def test_tokens_that_do_not_divide(two_ranks) -> None:
    with pytest.raises(InfeasibleError, match="31 tokens do not divide over 2 ranks"):
        planner.make(subject.load("gpt-tiny", batch=2, tokens=31), two_ranks, "tp-sp")


def test_zero_reduces_too_early_for_it(tiny, two_ranks) -> None:
    plan = planner.make(tiny, two_ranks, "tp-sp")
    sharded = planner.make(tiny, two_ranks, "zero-1").placements
    both = replace(plan, placements=(*plan.placements, *sharded))
    with pytest.raises(UsageError, match="split by tokens"):
        native.check_ways(both)


def verified(plans, folder: Path) -> None:
    paths = [folder / f"{index}.json" for index in range(len(plans))]
    for plan, path in zip(plans, paths, strict=True):
        io.save(plan, path)
    for report in verify.verify(paths):
        assert report.holds, report
        assert "sequence parallel" in report.rung


def test_a_region_whole_modules_and_grouped_heads(two_ranks, tmp_path: Path) -> None:
    llama = subject.load("llama-tiny", batch=4, tokens=16)
    t5 = subject.load("t5-tiny", batch=4, tokens=8, source_tokens=16)
    plans = [
        planner.make(llama, two_ranks, "tp-sp", microbatches=2, recompute=True),
        planner.make(t5, two_ranks, "tp-sp", microbatches=2),
    ]
    verified(plans, tmp_path)


@pytest.mark.slow
def test_over_replicated_and_sharded_data(tiny, tmp_path: Path) -> None:
    cluster = find_cluster("cpux4")
    plans = []
    for how in ("replicate", "shard"):
        plan = library.find("fsdp-tp")(tiny, cluster, microbatches=2, recompute=True)
        placements = tuple(
            replace(entry, how=how) if entry.axis == "data" else entry for entry in plan.placements
        )
        placements += sequence_parallel.placed(tiny, plan)
        plans.append(predict.predict(replace(plan, placements=placements), tiny, cluster))
    verified(plans, tmp_path)
