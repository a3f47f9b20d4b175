"""Over which ranks the gradients of weights are summed: equal, disjoint and overlapping parts."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import InfeasibleError
from toolkit.hardware import find_cluster
from toolkit.plan.materialize import reducers
from toolkit.plan.tensors import Mask, PTensor, VTensor

CLUSTER = find_cluster("2xh100x8")


def part(array, mask):
    return array[tuple(slice(start, end) for start, end in mask.box)]


def integers(rng, shape):
    return np.array([rng.randint(-9, 9) for _ in range(math.prod(shape))], float).reshape(shape)


def views(tensor, masks):
    return [VTensor(tensor, mask, rank, f"op{rank}") for rank, mask in enumerate(masks)]


def slices(tensor, dim, num):
    return [Mask.whole(tensor.shape).split(dim, i, num) for i in range(num)]


WEIGHT = PTensor("w", (12, 8))
ALL = Mask.whole(WEIGHT.shape)


def test_data_parallel_reduces_over_everyone_and_zero_leaves_shares():
    used = views(WEIGHT, [ALL] * 5)
    (found,) = reducers(WEIGHT, used, CLUSTER)
    assert (found.kind, found.ranks, found.mask) == ("all_reduce", (0, 1, 2, 3, 4), ALL)
    assert found.num_bytes == WEIGHT.num_bytes
    (shared,) = reducers(WEIGHT, used, CLUSTER, sharded=True)
    assert shared.kind == "reduce_scatter"
    assert shared.num_bytes == 100 * 4  # 96 elements padded to a multiple of 5
    assert shared.gather_s > 0


def test_tensor_parallel_reduces_each_slice_over_its_own_copies():
    """2 x 2: rows over pairs of ranks, batch over the two halves."""
    used = views(WEIGHT, slices(WEIGHT, 0, 2) * 2)
    found = reducers(WEIGHT, used, CLUSTER)
    assert {(f.mask, f.ranks) for f in found} == {
        (slices(WEIGHT, 0, 2)[0], (0, 2)), (slices(WEIGHT, 0, 2)[1], (1, 3)),
    }  # fmt: skip
    assert reducers(WEIGHT, used[:2], CLUSTER) == ()


def test_replicas_are_reduced_with_others_and_not_among_themselves():
    used = [VTensor(WEIGHT, ALL, rank, f"norm of batch {rank // 2}") for rank in range(4)]
    found = reducers(WEIGHT, used, CLUSTER)
    assert {f.ranks for f in found} == {(0, 2), (1, 3)}
    with pytest.raises(InfeasibleError, match=r"w\[0:12, 0:8\] is read by .* not replicated alike"):
        reducers(WEIGHT, used[:3], CLUSTER)


@given(st.randoms(use_true_random=False), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_holder_gets_the_sum_over_all_that_share(rng, sharded):
    """Any overlapping boxes, each read by one operator on a rank of its own."""
    ranks = rng.sample(list(CLUSTER.ranks), rng.randint(1, 6))
    used = []
    for rank in ranks:
        box = []
        for size in WEIGHT.shape:
            start = rng.randrange(size)
            box.append((start, rng.randint(start + 1, size)))
        used.append(VTensor(WEIGHT, Mask(tuple(box)), rank, f"op{rank}"))
    gradients = {view.rank: integers(rng, WEIGHT.shape) for view in used}
    result = {rank: value.copy() for rank, value in gradients.items()}
    for found in reducers(WEIGHT, used, CLUSTER, sharded=sharded):
        total = sum(part(gradients[rank], found.mask) for rank in found.ranks)
        for rank in found.ranks:
            part(result[rank], found.mask)[...] = total
    for view in used:
        expected = np.zeros(WEIGHT.shape)
        for other in used:
            part(expected, other.mask)[...] += part(gradients[other.rank], other.mask)
        np.testing.assert_array_equal(part(result[view.rank], view.mask), part(expected, view.mask))
    boxes = [(f.mask.box, r) for f in reducers(WEIGHT, used, CLUSTER) for r in f.ranks]
    for (one, rank), (two, other) in itertools.combinations(boxes, 2):
        assert rank != other or (Mask(one) & Mask(two)) is None
