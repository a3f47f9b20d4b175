"""Layouts of real operators: the solved block costs what trying every combination costs least."""

from __future__ import annotations

import itertools

import pytest

from toolkit.hardware import find_cluster
from toolkit.plan import subject
from toolkit.plan.search.choice import Weights
from toolkit.plan.search.layouts import Axis, R, Resharding, V
from toolkit.plan.search.stack import Outline, Stack

FOUR = (Axis("tensor", 4, (0, 1, 2, 3)),)
GRID = (Axis("context", 2, (0, 2), 2), Axis("tensor", 2, (0, 1), 2))


@pytest.fixture(scope="module")
def mlp(request):
    """Four blocks of Linear, ReLU, Linear."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(request.path.parent))
    traced = subject.load("toy_models:chain", batch=64)
    patch.undo()
    return traced


@pytest.mark.parametrize("axes", [FOUR, GRID])
@pytest.mark.parametrize("cluster", ["h100x4", "cpux4"])
def test_a_block_of_a_model_equals_brute_force(mlp, axes, cluster) -> None:
    outline = Outline(mlp, find_cluster(cluster))
    stack = Stack(outline, find_cluster(cluster), axes, 64)
    kind = outline.items[2].kind
    segment = stack.segments[kind]
    found = segment.solve(Weights(), {}, {})
    assert found is not None

    def total(dims) -> float:
        fixed = segment.solve(Weights(), {}, {}, fixed=dims)
        cost = segment.cost(fixed)
        return cost.forward_s + cost.backward_s + cost.sync_s

    every = [
        dict(zip((op.name for op in segment.active), dims, strict=True))
        for dims in itertools.product(
            *([way.dims for way in segment.ways(op)] for op in segment.active)
        )
    ]
    assert len(every) >= 12
    assert total(found.dims) == pytest.approx(min(map(total, every)), rel=1e-9)


def test_a_ring_of_resharding_prices() -> None:
    cluster = find_cluster("h100x4")
    move = Resharding(FOUR, cluster).seconds
    size = 2.0**24
    assert move(size, (R,), (0,)) == 0  # a slice is at hand
    assert move(size, (0,), (V,)) == 0  # zeros around it make it a partial sum
    gather, scatter = move(size, (0,), (R,)), move(size, (V,), (0,))
    assert move(size, (V,), (R,)) <= gather + scatter
    assert 0 < move(size, (0,), (1,)) < gather


def test_two_axes_move_what_is_small() -> None:
    """Scattered over one axis first, the all-reduce over the other has half as much to do."""
    cluster = find_cluster("h100x4")
    move = Resharding(GRID, cluster).seconds
    size = 2.0**26
    assert move(size, (V, V), (0, R)) < move(size, (V, R), (R, R)) + move(size, (R, V), (R, R))


def test_samples_are_left_to_the_data_axis(mlp) -> None:
    cluster = find_cluster("h100x4")
    stack = Stack(Outline(mlp, cluster), cluster, FOUR, 64)
    for segment in stack.segments.values():
        for op in segment.active:
            assert not any("a" in way.dims for way in segment.ways(op) if op.kind == "aten.relu")
