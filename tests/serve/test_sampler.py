"""Draws follow the distribution, its cuts, and the seed; neighbours change nothing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import UsageError
from toolkit.serve.batch import Batch, Slice
from toolkit.serve.model.sampler import draw, sample
from toolkit.serve.request import Phase, Request, SamplingParams

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


def decoding(name: str, output: list[int], **params: object) -> Request:
    made = Request(name, (3, 4), SamplingParams(**params), output_ids=output)  # type: ignore[arg-type]
    made.num_computed, made.phase = made.num_tokens - 1, Phase.DECODE
    return made


def step(logits: torch.Tensor, *requests: Request) -> list[int | None]:
    pieces = [Slice(r, r.phase, r.num_computed, r.num_tokens) for r in requests]
    return list(draw(logits, Batch(1, tuple(pieces))).token_ids)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, 0),
        ({"presence_penalty": 1.5}, 1),
        ({"frequency_penalty": 0.6}, 1),
        ({"frequency_penalty": 0.4}, 0),
        ({"repetition_penalty": 2.5}, 1),
        ({"logit_bias": ((4, 10.0),)}, 4),
        ({"logit_bias": ((0, -100.0),)}, 1),
        ({"min_tokens": 3}, 1),
        ({"min_tokens": 2}, 0),
    ],
)
def test_changes_of_logits(params: dict[str, object], expected: int) -> None:
    # Token 0 leads by 1 and has been said twice; it also ends the text.
    request = decoding("a", [0, 0], **params)
    request.end_ids = frozenset({0})
    before = LOGITS.clone()
    assert step(LOGITS, request) == [expected]
    assert torch.equal(before, LOGITS), "the logits of others' scores were changed"


def test_repetition_counts_the_prompt_and_pushes_negative_logits_down() -> None:
    request = decoding("a", [], repetition_penalty=2.0)
    logits = torch.tensor([[-9.0, -9.0, -9.0, -1.0, -1.5]])
    assert step(logits, request) == [3]
    assert step(logits - torch.tensor([0, 0, 0, 1.2, 0]), request) == [4]


def test_changed_rows_leave_their_neighbours_alone() -> None:
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    plain = [decoding(f"r{i}", [1, 2], temperature=0.8, seed=i) for i in range(3)]
    alone = [step(rows[i : i + 1], plain[i])[0] for i in range(3)]
    biased = decoding("r1", [1, 2], logit_bias=((7, 50.0),), temperature=0.8)
    assert step(rows, plain[0], biased, plain[2]) == [alone[0], 7, alone[2]]


def test_scores_of_a_prompt_and_of_what_follows() -> None:
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(2))
    logprobs = torch.log_softmax(logits, -1)
    scored = Request("scored", (1, 2, 3, 4), SamplingParams(logprobs=2, prompt_logprobs=1))
    other = decoding("other", [9])
    pieces = (Slice(scored, Phase.PREFILL, 0, 4), Slice(other, Phase.DECODE, 2, 3))
    result = draw(logits, Batch(1, pieces))
    detail = result.details["scored"]
    assert [score.token_id for score in detail.prompt] == [2, 3, 4]
    for row, score in enumerate(detail.prompt):
        assert score.logprob == pytest.approx(float(logprobs[row, score.token_id]))
        assert score.rank == int((logits[row] > logits[row, score.token_id]).sum()) + 1
        assert score.top[0][0] == int(logits[row].argmax())
    assert detail.score is not None
    assert detail.score.token_id == result.token_ids[0] == int(logits[3].argmax())
    assert [token for token, _ in detail.score.top] == logits[3].topk(2).indices.tolist()
    assert result.token_ids[1] == int(logits[4].argmax())
    assert set(result.details) == {"scored"}
