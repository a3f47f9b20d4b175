"""Stages: the dynamic program finds what trying every cut finds, on mixed devices too."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.plan.search.inter_op import cut


def every_cut(num_items, num_devices):
    """(begins, classes) of every cut there is."""
    classes = [cls for cls, count in enumerate(num_devices) for _ in range(count)]
    orders = sorted(set(itertools.permutations(classes)))
    inner = itertools.combinations(range(1, num_items), len(classes) - 1)
    return [((0, *begins), order) for begins in inner for order in orders]


@st.composite
def chains(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    counts = draw(st.sampled_from([[1], [2], [3], [4], [1, 1], [2, 1], [1, 2], [2, 2], [1, 1, 1]]))
    num_items = draw(st.integers(sum(counts), sum(counts) + 4))
    alike = draw(st.booleans())
    costs = np.full(num_items, 1.0) if alike else rng.integers(1, 9, num_items).astype(float)
    speeds = rng.integers(1, 4, len(counts))
    matrices = {}
    for stage in range(sum(counts)):
        for cls in range(len(counts)):
            matrix = np.full((num_items + 1, num_items + 1), np.inf)
            for i in range(num_items):
                for j in range(i + 1, num_items + 1):
                    if rng.random() > 0.15:
                        matrix[i, j] = costs[i:j].sum() / speeds[cls] + rng.integers(0, 2)
            matrices[stage, cls] = matrix
    return num_items, counts, matrices, draw(st.integers(1, 20))


@settings(max_examples=200, deadline=None)
@given(chains())
def test_the_cut_is_what_trying_every_cut_finds(drawn) -> None:
    num_items, counts, matrices, num_microbatches = drawn
    best = math.inf
    for begins, classes in every_cut(num_items, counts):
        ends = (*begins[1:], num_items)
        times = [matrices[s, k][begins[s], ends[s]] for s, k in enumerate(classes)]
        if math.isfinite(max(times)):
            best = min(best, (num_microbatches - 1) * max(times) + sum(times))
    found = cut(lambda stage, cls: matrices[stage, cls], num_items, counts, num_microbatches)
    if found is None:
        assert best == math.inf
        return
    assert found.seconds(num_microbatches) == pytest.approx(best)
    ends = found.ends(num_items)
    times = [matrices[s, k][found.begins[s], ends[s]] for s, k in enumerate(found.classes)]
    assert found.slowest_s == pytest.approx(max(times))
    assert found.total_s == pytest.approx(sum(times))
    assert sorted(found.classes) == sorted(k for k, n in enumerate(counts) for _ in range(n))


def test_no_cut_into_more_stages_than_items() -> None:
    matrix = np.where(np.tri(4, 4, -1, dtype=bool).T, 1.0, np.inf)
    assert cut(lambda stage, cls: matrix, 3, [4], 2) is None
