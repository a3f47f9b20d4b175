"""Draw each sequence's next token from its logits, and say how likely it was.

A draw depends on the request's own logits, parameters, seed and output position only, so a
request's tokens do not change with its neighbours, its batch or a preemption.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch

from toolkit.serve.batch import Batch, Detail, Score, Slice, StepResult
from toolkit.serve.request import Request, SamplingParams

Likeliest = Callable[[torch.Tensor], list[int]]

# Nucleus sampling looks at this many candidates before it sorts a whole vocabulary.
_CANDIDATES = 1024


def likeliest(logits: torch.Tensor) -> list[int]:
    """Return the token with the largest logit of each row `[rows, vocabulary]`."""
    tokens: list[int] = torch.argmax(logits, dim=-1).tolist()
    return tokens


def draw(
    logits: torch.Tensor,
    batch: Batch,
    hidden: torch.Tensor | None = None,
    likeliest: Likeliest = likeliest,
) -> StepResult:
    """Return the step's tokens, and the scores and sums of hidden states that were asked for.

    `logits` `[rows, vocabulary]` hold `Slice.num_logits` rows a slice, in the batch's order; where
    a slice samples, its last row is the one drawn from. `hidden` `[tokens, hidden size]` holds the
    last hidden states of every pooled slice's tokens, in the same order. `likeliest` is how the
    largest logit of each row is found.
    """
    first, last_rows, sampling = 0, [], []
    details: dict[str, Detail] = {}
    for piece in batch.slices:
        end = first + piece.num_logits
        if piece.samples:
            last_rows.append(end - 1)
            sampling.append(piece.request)
        if piece.request.sampling.prompt_logprobs is not None and end > first:
            scores = _prompt_scores(logits[first:end], piece)
            details[piece.request.id] = Detail(prompt=scores)
        first = end
    assert first == len(logits), f"{len(logits)} rows of logits, {first} expected"
    raw = logits if len(last_rows) == len(logits) else logits[last_rows]
    tokens = sample(
        _changed(raw, sampling),
        [request.sampling for request in sampling],
        [(request.seed, len(request.output_ids)) for request in sampling],
        likeliest,
    )
    for row, (request, token) in enumerate(zip(sampling, tokens, strict=True)):
        if request.sampling.logprobs is not None:
            (score,) = _scores(raw[row : row + 1], [token], request.sampling.logprobs)
            prompt = details[request.id].prompt if request.id in details else ()
            details[request.id] = Detail(score, prompt)
    if hidden is not None:
        pooled = [piece for piece in batch.slices if piece.request.pooled]
        parts = hidden.double().split([piece.num_tokens for piece in pooled])
        for piece, part in zip(pooled, parts, strict=True):
            details[piece.request.id] = Detail(hidden_sum=tuple(part.sum(0).tolist()))
    drawn = iter(tokens)
    token_ids = tuple(next(drawn) if piece.samples else None for piece in batch.slices)
    return StepResult(token_ids, details)


def sample(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    keys: Sequence[tuple[int, int]],
    likeliest: Likeliest = likeliest,
) -> list[int]:
    """Return one token id per row of `logits` `[rows, vocabulary]`.

    `keys` holds each row's (seed, number of tokens drawn before).
    """
    tokens = likeliest(logits)
    for row, (chosen, key) in enumerate(zip(params, keys, strict=True)):
        if not chosen.greedy:
            tokens[row] = _draw(logits[row], chosen, _uniform(*key))
    return tokens


def is_greedy(batch: Batch) -> bool:
    """Whether every token drawn is the likeliest by the logits as they are, and none is scored.

    Then `draw` reads nothing of the logits but where each row's largest lies.
    """
    return not any(
        _is_changed(request)
        or not request.sampling.greedy
        or request.sampling.logprobs is not None
        or request.sampling.prompt_logprobs is not None
        for request in (piece.request for piece in batch.slices)
    )


def _changed(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Return the logits after everything that comes before temperature; the given ones stay."""
    rows = [row for row, request in enumerate(requests) if _is_changed(request)]
    if not rows:
        return logits
    logits = logits.clone()
    for row in rows:
        _change(logits[row], requests[row])
    return logits


def _is_changed(request: Request) -> bool:
    return request.grammar is not None or request.sampling.changes_logits


def _change(logits_V: torch.Tensor, request: Request) -> None:
    params, output = request.sampling, request.output_ids
    if params.logit_bias:
        ids, added = zip(*params.logit_bias, strict=True)
        logits_V[list(ids)] += torch.tensor(added, dtype=logits_V.dtype)
    if len(output) < params.min_tokens and request.end_ids and request.grammar is None:
        logits_V[list(request.end_ids)] = float("-inf")
    if params.repetition_penalty != 1:
        seen = list({*request.prompt_ids, *output})
        old = logits_V[seen]
        penalty = params.repetition_penalty
        logits_V[seen] = torch.where(old > 0, old / penalty, old * penalty)
    if output and (params.frequency_penalty or params.presence_penalty):
        counts = Counter(output)
        times = torch.tensor(list(counts.values()), dtype=logits_V.dtype)
        taken = params.frequency_penalty * times + params.presence_penalty
        logits_V[list(counts)] -= taken
    if request.grammar is not None:
        request.grammar.mask(logits_V)


def _prompt_scores(logits: torch.Tensor, piece: Slice) -> tuple[Score, ...]:
    """Score the prompt's tokens that follow each of the slice's."""
    request, top = piece.request, piece.request.sampling.prompt_logprobs
    following = request.prompt_ids[piece.start + 1 : piece.end + 1]
    return _scores(logits[: len(following)], following, top or 0)


def _scores(logits: torch.Tensor, token_ids: Sequence[int], top: int) -> tuple[Score, ...]:
    """Return the scores of one token per row, with the `top` likeliest of each row."""
    if not token_ids:
        return ()
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids).unsqueeze(1))
    ranks = (logprobs > chosen).sum(1).add_(1).tolist()
    best, ids = torch.topk(logprobs, top, dim=-1) if top else (None, None)
    likeliest: list[tuple[tuple[int, float], ...]] = [()] * len(token_ids)
    if best is not None and ids is not None:
        likeliest = [
            tuple(zip(i, p, strict=True)) for i, p in zip(ids.tolist(), best.tolist(), strict=True)
        ]
    columns = (token_ids, chosen[:, 0].tolist(), ranks, likeliest)
    return tuple(Score(*column) for column in zip(*columns, strict=True))


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
    if not reached[-1] > 0:
        # Nothing is allowed at all, as where a grammar leads nowhere.
        return int(torch.argmax(logits))
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
