"""Library plans that only the own executor runs: parity, exact traffic, and what they refuse.

The whole matrix is slow; test_run_program.py always runs a slice of it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from toolkit import record
from toolkit.errors import InfeasibleError
from toolkit.hardware import find_cluster
from toolkit.plan import subject
from toolkit.plan.library import (
    co_shard,
    context_parallel,
    dap,
    grid,
    interlaced,
    three_f_one_b,
)
from toolkit.plan.lower.program import shortcuts
from toolkit.plan.lower.program.executor import segments
from toolkit.plan.lower.program.walk import Walk
from toolkit.plan.program import rules

sys.path.append(str(Path(__file__).parent))
from program_check import check

SIZES = {
    "gpt-tiny": {"batch": 8, "tokens": 32},
    "swin-nano": {"batch": 8},
    "t5-tiny": {"batch": 8, "tokens": 16, "source_tokens": 16},
    "evoformer-tiny": {"batch": 4, "tokens": 8, "sequences": 4},
}


@pytest.fixture(scope="module")
def traced():
    """Models by name, each traced once, when it is first asked for."""
    found: dict[str, subject.Subject] = {}

    def load(name: str) -> subject.Subject:
        if name not in found:
            found[name] = subject.load(name, **SIZES[name])
        return found[name]

    return load


def matrix(model: str, load, ranks: int) -> list:
    """Every plan that applies to a model, on so many ranks."""
    found, cluster = load(model), find_cluster(f"cpux{ranks}")
    if model == "evoformer-tiny":
        return [
            three_f_one_b.plan(found, cluster, microbatches=2, data=ranks // 2),
            dap.plan(found, cluster, microbatches=1, context=2),
        ]
    plans = [
        grid.plan(found, cluster, tensor=2, microbatches=2, recompute=True),
        grid.plan(found, cluster, pipeline=2, tensor=ranks // 2, microbatches=4),
        co_shard.plan(found, cluster, parts=2, microbatches=2),
    ]
    if model != "swin-nano":
        plans.append(interlaced.plan(found, cluster, microbatches=2, data=ranks // 2))
    if model == "gpt-tiny":
        plans.append(context_parallel.plan(found, cluster, microbatches=2, context=2))
    return plans


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("model", list(SIZES))
def test_every_plan_that_applies(model: str, ranks: int, dtype: str, traced) -> None:
    check(matrix(model, traced, ranks), traced(model), dtype=dtype)


def test_an_embedding_is_nowhere_whole_when_interlaced(traced, two_ranks) -> None:
    plan = interlaced.plan(traced("t5-tiny"), two_ranks, microbatches=2)
    shared = [stage for stage in plan.stages if len(stage.devices) == 2]
    assert len(shared) == 3  # the source's embedding, the target's, and the head
    assert {split.axis for split in plan.splits} == {"pipeline"}
    assert {row.index(action) >= 0 for row in plan.order for action in row} == {True}


def test_passes_without_gradients_have_no_backward(traced, two_ranks) -> None:
    plan = three_f_one_b.plan(traced("evoformer-tiny"), two_ranks, microbatches=2)
    assert [stage.no_grad for stage in plan.stages] == [True] * 4 + [False] * 2
    backwards = {action.stage for row in plan.order for action in row if action.kind == "B"}
    assert backwards == {4, 5}


def test_what_does_not_apply_is_said(traced, two_ranks) -> None:
    gpt, swin, evoformer = (traced(n) for n in ("gpt-tiny", "swin-nano", "evoformer-tiny"))
    with pytest.raises(InfeasibleError, match="no tokens"):
        context_parallel.plan(swin, two_ranks)
    with pytest.raises(InfeasibleError, match="no alignment and pairs"):
        dap.plan(gpt, two_ranks)
    with pytest.raises(InfeasibleError, match="runs its blocks once"):
        three_f_one_b.plan(gpt, two_ranks)
    with pytest.raises(InfeasibleError, match="no vocabulary"):
        interlaced.plan(swin, two_ranks)
    with pytest.raises(InfeasibleError, match="co-shards of 3 does not divide 4"):
        co_shard.plan(gpt, two_ranks, parts=3)
    with pytest.raises(InfeasibleError, match="tensor degree of 4 does not divide 2"):
        grid.plan(swin, find_cluster("cpux4"), tensor=4)
    with pytest.raises(InfeasibleError, match="positions do not fit the 2 blocks"):
        three_f_one_b.plan(evoformer, find_cluster("cpux4"))


def test_narrow_tables_are_looked_up_as_by_torch(traced, two_ranks) -> None:
    """A co-shard of Swin's position bias, and its gradient."""
    swin = traced("swin-nano")
    walk = Walk(co_shard.plan(swin, two_ranks, parts=2), swin.graph, two_ranks)
    stretches = segments(walk.script(0, 0).items)
    lookups = [call for one in stretches for call in one.calls if call.op.kind == "aten.embedding"]
    assert len(lookups) == 2 * 4  # parts, blocks
    call = lookups[0]
    found = walk.written.annotations[call.op.name]
    torchs = rules.prepare(call.op, found, call.part.region, walk.written.outputs(call.part))
    table, ids = (mask.shape for _, mask in walk.written.reads(call.part))
    given = torch.randn(table, requires_grad=True)
    places = torch.randint(0, table[0], ids)
    (ours,), (theirs,) = shortcuts.runner(call, walk.written)(given, places), torchs(given, places)
    weights = torch.randn_like(ours)
    assert torch.equal(ours, theirs)
    assert ours.grad_fn.name() != theirs.grad_fn.name()
    got, want = (torch.autograd.grad(one, given, weights)[0] for one in (ours, theirs))
    torch.testing.assert_close(got, want)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_co_shard_keeps_a_fraction_of_the_activations(tmp_path: Path) -> None:
    """Peak activations, tracked: at least 3x below keeping all, 1.5x below recomputing layers."""
    out = tmp_path / "found.json"
    bench = Path(__file__).parents[2] / "recipes" / "bench" / "plan_co_shard.py"
    arguments = ["--rounds", "0", "--parts", "4", "-o", str(out)]
    subprocess.run([sys.executable, str(bench), *arguments], check=True)
    found = record.read(out, kind="plan-co-shard", version=1)["body"]["models"]
    assert {entry["model"] for entry in found} == {"gpt", "swin"}
    for entry in found:
        peaks = entry["peak_bytes"]
        assert peaks["keep all"] / peaks["co-shard 4"] >= 3.0
        assert peaks["layers"] / peaks["co-shard 4"] >= 1.5
