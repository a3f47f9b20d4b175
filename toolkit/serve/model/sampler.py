"""Draw each sequence's next token from its logits.

A draw depends on the request's own logits, parameters, seed and output position only, so a
request's tokens do not change with its neighbours, its batch or a preemption.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from toolkit.serve.request import SamplingParams

# Nucleus sampling looks at this many candidates before it sorts a whole vocabulary.
_CANDIDATES = 1024


def sample(
    logits: torch.Tensor, params: Sequence[SamplingParams], keys: Sequence[tuple[int, int]]
) -> list[int]:
    """Return one token id per row of `logits` `[rows, vocabulary]`.

    `keys` holds each row's (seed, number of tokens drawn before).
    """
    tokens: list[int] = torch.argmax(logits, dim=-1).tolist()
    for row, (chosen, key) in enumerate(zip(params, keys, strict=True)):
        if not chosen.greedy:
            tokens[row] = _draw(logits[row], chosen, _uniform(*key))
    return tokens


def _uniform(seed: int, index: int) -> float:
    """Return the `index`-th number in [0, 1) of the stream named `seed` (counter-based)."""
    bits = np.random.Philox(key=seed % 2**64, counter=index)
    return float(np.random.Generator(bits).random())


def _draw(logits: torch.Tensor, params: SamplingParams, uniform: float) -> int:
    """Temperature, then top-k, top-p and min-p, then the inverse of the cumulative sum."""
    scaled = logits.double() / params.temperature
    ids: torch.Tensor | None = None
    if params.top_k:
        scaled, ids = torch.topk(scaled, min(params.top_k, len(scaled)))
    probabilities = torch.softmax(scaled, dim=-1)
    if params.top_p < 1:
        if ids is None:
            probabilities, ids = _nucleus(probabilities, params.top_p)
        # A token stays if those before it do not yet hold top_p: never fewer than one.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.where(before < params.top_p, 0.0)
    if params.min_p > 0:
        floor = params.min_p * probabilities.max()
        probabilities = probabilities.where(probabilities >= floor, 0.0)
    reached = probabilities.cumsum(-1)
    target = uniform * reached[-1]
    index = int(torch.searchsorted(reached, target, right=True))
    # Rounding may carry the target to the very end: take the last token that is allowed at all.
    if index >= len(reached) or probabilities[index] == 0:
        index = int(probabilities.nonzero()[-1])
    return index if ids is None else int(ids[index])


def _nucleus(probabilities: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the most probable tokens, descending, and their ids: enough to hold `top_p`."""
    found, ids = torch.topk(probabilities, min(_CANDIDATES, len(probabilities)))
    if found.sum() >= top_p or len(found) == len(probabilities):
        return found, ids
    return torch.sort(probabilities, descending=True)
