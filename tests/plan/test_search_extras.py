"""Plans of the library that a search writes beside its own: chosen where they win, left out where
constraints say so.
"""

from __future__ import annotations

import pytest

from toolkit.errors import InfeasibleError, UsageError
from toolkit.hardware import find_cluster
from toolkit.plan import check, predict, subject
from toolkit.plan.search import Constraints, search


@pytest.fixture(scope="module")
def load(request):
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(request.path.parent))
    yield subject.load
    patch.undo()


def fits(found, limit) -> bool:
    check.check(found.plan)
    return found.plan.prediction.peak_bytes <= limit


def test_less_memory_than_recomputation_needs_is_co_sharded(load) -> None:
    """Nothing else fits: recomputed blocks have all of their activations at once."""
    traced = load("search_models:many_tokens", batch=1)
    cluster = find_cluster("v100x1")
    alone = Constraints(plans=[])
    least = min(one.peak_bytes for one in search(traced, cluster, constraints=alone).frontier)
    limit = 0.75 * least
    with pytest.raises(InfeasibleError):
        search(traced, cluster, memory_limit_bytes=limit, constraints=alone)
    found = search(traced, cluster, memory_limit_bytes=limit)
    assert found.plan.strategy == "co-shard"
    assert fits(found, limit)
    assert any(split.axis is None for split in found.plan.splits)


def test_only_as_many_blocks_are_co_sharded_as_memory_asks_for(load) -> None:
    traced = load("search_models:many_tokens", batch=1)
    cluster = find_cluster("v100x1")
    free = search(traced, cluster, constraints=Constraints(plans=[], recompute=["none"]))
    steps = []
    for share in (0.8, 0.5):
        limit = share * free.best.peak_bytes
        found = search(traced, cluster, memory_limit_bytes=limit)
        assert fits(found, limit)
        steps.append(found.plan.prediction.step_s)
    assert free.best.step_s <= steps[0] <= steps[1]


def test_a_large_vocabulary_is_interlaced(load) -> None:
    traced = load("search_models:large_vocabulary", batch=32, dtype="float16")
    cluster = find_cluster("v100x4")
    limit = 600 * 2**20
    wanted = {"pipeline": 4, "microbatch_size": 1}
    found = search(
        traced, cluster, memory_limit_bytes=limit, constraints=Constraints(**wanted)
    )  # fmt: skip
    assert found.plan.strategy == "interlaced"
    assert fits(found, limit)
    assert any(len(stage.devices) == 4 for stage in found.plan.stages)
    with pytest.raises(InfeasibleError):
        search(
            traced, cluster, memory_limit_bytes=limit,
            constraints=Constraints(**wanted, plans=[], offload=["none"]),
        )  # fmt: skip


def test_models_that_run_blocks_several_times_are_planned() -> None:
    traced = subject.load("evoformer-tiny", batch=8)
    cluster = find_cluster("cpux2")
    found = search(traced, cluster)
    check.check(found.plan)
    strategies = {one.description.partition(":")[0] for one in found.frontier}
    assert "3f1b" in strategies
    steps = [one.step_s for one in found.frontier]
    assert found.plan.prediction.step_s == min(steps)
    piped = search(traced, cluster, constraints=Constraints(pipeline=2))
    assert piped.plan.strategy == "3f1b"
    assert sum(stage.no_grad for stage in piped.plan.stages) == 4
    with pytest.raises(InfeasibleError, match="several times"):
        search(traced, cluster, constraints=Constraints(plans=[]))
    with pytest.raises(InfeasibleError, match="nearest"):
        search(traced, cluster, memory_limit_bytes=1000)


def test_encoders_and_decoders_are_planned() -> None:
    traced = subject.load("t5-tiny", batch=8)
    found = search(traced, find_cluster("cpux2"))
    check.check(found.plan)
    assert (
        found.plan.prediction
        == predict.predict(found.plan, traced, find_cluster("cpux2")).prediction
    )


def test_a_named_way_to_split_is_kept_to() -> None:
    """Heads of attention that no placement of Linears splits, and the vocabulary."""
    traced = subject.load("t5-tiny", batch=4)
    wanted = Constraints(tensor=2, splits=["regions"], plans=[], microbatches=4)
    found = search(traced, find_cluster("v100x2"), constraints=wanted)
    split = {one.ops for one in found.plan.splits}
    assert found.best.split == "heads, features and vocabulary"
    assert any("attention" in name for name in split)
    assert any("embedding" in name for name in split)


def test_unknown_plans_are_an_error() -> None:
    with pytest.raises(UsageError, match="did you mean 'co-shard'"):
        Constraints(plans=["coshard"])
    with pytest.raises(UsageError, match="did you mean 'regions'"):
        Constraints(splits=["region"])
