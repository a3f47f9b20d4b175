"""Greedy tokens of an engine beside those of transformers' model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from toolkit.serve.engine import Engine
from toolkit.serve.request import Request, SamplingParams

# Two of float32's sums in another order may pick either of two tokens this close.
NEAR_TIE = 1e-4


def generate(engine: Engine, prompts: Sequence[Sequence[int]], num: int) -> list[list[int]]:
    sampling = SamplingParams(max_tokens=num, ignore_eos=True)
    requests = [Request(f"r{i}", tuple(ids), sampling) for i, ids in enumerate(prompts)]
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
    return [request.output_ids for request in requests]


def assert_equal(reference: Any, prompt: Sequence[int], ours: list[int], theirs: list[int]) -> None:
    """Equal, or first different at two logits of transformers' that all but tie."""
    if ours == theirs:
        return
    at = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
    with torch.inference_mode():
        logits = reference(torch.tensor([[*prompt, *theirs[:at]]])).logits[0, -1]
    gap = float(logits[theirs[at]] - logits[ours[at]])
    assert gap < NEAR_TIE, f"token {at} is {ours[at]}, not {theirs[at]}; the logits are {gap} apart"


def greedy(reference: Any, ids: Sequence[int], num: int) -> list[int]:
    found = reference.generate(
        torch.tensor([list(ids)]),
        max_new_tokens=num,
        min_new_tokens=num,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return found[0, len(ids) :].tolist()


def check(
    reference: Any, prompts: list[list[int]], ours: list[list[int]], expected: list[list[int]]
) -> None:
    """Every prompt's tokens."""
    for ids, got, wanted in zip(prompts, ours, expected, strict=True):
        assert_equal(reference, ids, got, wanted)
