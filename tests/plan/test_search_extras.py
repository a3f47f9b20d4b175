"""Plans of the library that a search writes beside its own: chosen where they win, left out where
constraints say so.
"""

from __future__ import annotations

import math

import pytest

from toolkit.errors import InfeasibleError, UsageError
from toolkit.hardware import find_cluster
from toolkit.plan import check, predict, subject
from toolkit.plan.search import Constraints, search
from toolkit.plan.search.finalists import written
from toolkit.plan.search.outer import Outer


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


@pytest.fixture(scope="module")
def evoformer():
    return subject.load("evoformer-tiny", batch=8)


@pytest.mark.parametrize(
    "wanted",
    [
        {"pipeline": 2, "data": 2, "microbatches": 4},
        {"data": 4, "microbatches": 2},
        {"tensor": 2, "pipeline": 2, "splits": ["heads"], "microbatches": 4},
    ],
)
def test_passes_without_gradients_are_estimated_as_predicted(evoformer, wanted) -> None:
    """3F1B, and one stage that runs its blocks three times, with all recomputed and nothing."""
    cluster = find_cluster("v100x4")
    rules = Constraints(**wanted, recompute=["none", "all"], parameters=["replicate"])
    doing = Outer(
        evoformer, cluster, 4, math.inf, rules, None, math.inf, lambda _doing, _best: None
    )
    doing.run()
    assert doing.frontier.members
    for candidate in doing.frontier.members:
        plan = written(candidate, doing)
        check.check(plan)
        assert candidate.step_s == pytest.approx(plan.prediction.step_s, rel=0.06)
        assert candidate.peak_bytes == pytest.approx(plan.prediction.peak_bytes, rel=0.3)


def test_models_that_run_blocks_several_times_are_planned(evoformer) -> None:
    traced = evoformer
    cluster = find_cluster("cpux2")
    found = search(traced, cluster)
    check.check(found.plan)
    assert any("3f1b" in one.description for one in found.frontier)
    steps = [one.step_s for one in found.frontier]
    assert found.plan.prediction.step_s == pytest.approx(min(steps), rel=0.1)
    piped = search(traced, cluster, constraints=Constraints(pipeline=2))
    assert piped.plan.schedule == "3f1b"
    assert sum(stage.no_grad for stage in piped.plan.stages) == 4
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


def test_heads_are_split_without_the_vocabulary() -> None:
    traced = subject.load("t5-tiny", batch=4)
    wanted = Constraints(tensor=2, splits=["heads"], plans=[], microbatches=4)
    split = {
        one.ops for one in search(traced, find_cluster("v100x2"), constraints=wanted).plan.splits
    }
    assert any("attention" in name for name in split)
    assert not any("embedding" in name for name in split)


def test_unknown_plans_are_an_error() -> None:
    with pytest.raises(UsageError, match="did you mean 'co-shard'"):
        Constraints(plans=["coshard"])
    with pytest.raises(UsageError, match="did you mean 'regions'"):
        Constraints(splits=["region"])
