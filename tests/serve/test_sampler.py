"""Draws follow the distribution, its cuts, and the seed; neighbours change nothing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import UsageError
from toolkit.serve.model.sampler import sample
from toolkit.serve.request import SamplingParams

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]])


def draws(params: SamplingParams, num: int = 4000, logits: torch.Tensor = LOGITS) -> Counter[int]:
    found: Counter[int] = Counter()
    for index in range(num):
        found.update(sample(logits, [params], [(11, index)]))
    return found


def test_frequencies_are_the_softmax() -> None:
    found = draws(SamplingParams(temperature=1.0))
    expected = torch.softmax(LOGITS[0], -1)
    # Chi-square with 4 degrees of freedom: 23.5 is passed once in ten thousand seeds.
    chi = sum((found[i] - 4000 * float(p)) ** 2 / (4000 * float(p)) for i, p in enumerate(expected))
    assert chi < 23.5


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        (SamplingParams(temperature=0.0), {0}),
        (SamplingParams(temperature=3.0, top_k=2), {0, 1}),
        (SamplingParams(temperature=1.0, top_p=0.6), {0}),
        (SamplingParams(temperature=1.0, top_p=0.7), {0, 1}),
        (SamplingParams(temperature=1.0, min_p=0.3), {0, 1}),
        (SamplingParams(temperature=1.0, top_k=3, top_p=0.99, min_p=0.01), {0, 1, 2}),
        (SamplingParams(temperature=5.0), {0, 1, 2, 3, 4}),
    ],
)
def test_cuts(params: SamplingParams, allowed: set[int]) -> None:
    assert set(draws(params, 600)) == allowed


def test_a_nucleus_wider_than_the_candidates() -> None:
    flat = torch.zeros(1, 5000)
    found = set(draws(SamplingParams(temperature=1.0, top_p=0.999), 400, flat))
    assert max(found) > 2000


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(-(2**63), 2**63), index=st.integers(0, 5000), others=st.integers(0, 4))
def test_neighbours_change_nothing(seed: int, index: int, others: int) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.95)
    rows = torch.randn(1 + others, 300, generator=torch.Generator().manual_seed(index))
    alone = sample(rows[:1], [params], [(seed, index)])
    mixed = [params, *[SamplingParams(temperature=1.3, top_k=5)] * others]
    keys = [(seed, index), *((seed + i, i) for i in range(others))]
    assert sample(rows, mixed, keys)[0] == alone[0]


def test_another_seed_is_another_text() -> None:
    rows = torch.zeros(1, 1000)
    texts = {
        tuple(sample(rows, [SamplingParams(temperature=1.0)], [(seed, i)])[0] for i in range(8))
        for seed in range(20)
    }
    assert len(texts) == 20


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -2}, {"min_p": 2},
     {"max_tokens": 0}, {"stop": ("",)}],
)  # fmt: skip
def test_wrong_parameters_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SamplingParams(**wrong)  # type: ignore[arg-type]
