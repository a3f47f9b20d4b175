"""Attention of decoding tokens over their KV blocks: one query token a sequence.

Block tables are read where they lie: nothing is gathered, and nothing depends on how long a
sequence is at the time of the call, so that a recorded call (a CUDA graph) serves later steps. On a
GPU it is the Triton kernel of kernels/paged.py; `reference` is the same in torch.

Shape suffixes: B sequences, H query heads, K key-value heads, G = H / K, D head size, M blocks of
the longest table, S block size, C = M x S context tokens.
"""

from __future__ import annotations

import math

import torch

from toolkit.errors import require

# Tokens of a span when contexts are short, and the most spans a context is cut into.
_SPAN, _MOST_SPANS = 256, 64


def attend(
    q_BHD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Return the attention's output `[B, H * D]` in the queries' type.

    `keys` and `values` `[blocks, K, S, D]` are one layer's cache, `tables` int32 `[B, M]` the
    blocks of each sequence, `lengths` int32 `[B]` how many tokens it has, the query's own included.
    A length of 0 is padding and gives zeros.
    """
    if q_BHD.device.type == "cpu":
        return reference(q_BHD, keys, values, tables, lengths)
    kernel = require("toolkit.serve.model.kernels.paged", extra="gpu")
    span, num_spans = spans(tables.shape[1] * keys.shape[2])
    mixed: torch.Tensor = kernel.launch(
        *(q_BHD, keys, values, tables, lengths),
        scale=q_BHD.shape[2] ** -0.5,
        span=span,
        num_spans=num_spans,
    )
    return mixed


def spans(max_context: int) -> tuple[int, int]:
    """Return the tokens of a span, and how many spans the longest context has.

    >>> spans(2048), spans(100), spans(131_072)
    ((256, 8), (256, 1), (2048, 64))
    """
    span = _SPAN * max(1, math.ceil(max_context / (_SPAN * _MOST_SPANS)))
    return span, max(1, math.ceil(max_context / span))


def reference(
    q_BHD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Return what `attend` does, computed in float32 over gathered blocks."""
    num_sequences, _, head_size = q_BHD.shape
    k_BKCD = keys[tables.long()].transpose(1, 2).flatten(2, 3).float()
    v_BKCD = values[tables.long()].transpose(1, 2).flatten(2, 3).float()
    q_BKGD = q_BHD.float().unflatten(1, (k_BKCD.shape[1], -1))
    score_BKGC = q_BKGD @ k_BKCD.transpose(2, 3) * head_size**-0.5
    live_BC = torch.arange(k_BKCD.shape[2], device=q_BHD.device) < lengths.unsqueeze(1)
    live_BKGC = live_BC[:, None, None, :]
    weight_BKGC = torch.softmax(score_BKGC.masked_fill(~live_BKGC, float("-inf")), dim=-1)
    # Of an empty sequence the softmax is 0 / 0, and what lies in dead places may be anything.
    weight_BKGC = weight_BKGC.masked_fill(~live_BKGC, 0.0)
    v_BKCD = v_BKCD.masked_fill(~live_BC[:, None, :, None], 0.0)
    return (weight_BKGC @ v_BKCD).to(q_BHD.dtype).reshape(num_sequences, -1)
