"""What a lossy weight format costs: how likely a model finds a text it did not write.

The text is the Python language's own help (`pydoc_data.topics`), which every installation has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from toolkit.serve.model.decoder import Decoder
from toolkit.serve.model.inputs import StepInput
from toolkit.serve.model.native import NativeDecoder


def held_text() -> str:
    """Return English prose of about 600 kB, the same for one version of Python."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def mean_nll(
    decoder: Decoder | NativeDecoder, token_ids: Sequence[int], *, window: int = 512
) -> float:
    """Return the mean negative log-likelihood (nats a token); perplexity is its exponential.

    The text is read in windows that know nothing of each other; a window's first token is given.
    """
    block = 16
    cache = decoder.make_cache(-(-window // block), block)
    total, count = 0.0, 0
    for ids in _windows(token_ids, window):
        logits = decoder.forward(_whole(ids, block), cache)
        log_likelihood = torch.log_softmax(logits[:-1], dim=-1)
        wanted = torch.tensor(ids[1:]).unsqueeze(1)
        total -= float(log_likelihood.gather(1, wanted).double().sum())
        count += len(ids) - 1
    return total / count if count else math.nan


def _windows(token_ids: Sequence[int], window: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(token_ids), window):
        ids = token_ids[first : first + window]
        if len(ids) > 1:
            yield ids


def _whole(ids: Sequence[int], block: int) -> StepInput:
    """Return a step that reads all of `ids` as one sequence and wants every row's logits."""
    rows = np.arange(len(ids), dtype=np.int32)
    return StepInput(
        tokens=np.array(ids, np.int32),
        positions=rows,
        slots=rows,
        sample_rows=rows,
        pooled_rows=np.zeros(0, np.int32),
        sequences=np.array([[0, len(ids), 0, 0]], np.int32),
        tables=np.arange(-(-len(ids) // block), dtype=np.int32),
    )
