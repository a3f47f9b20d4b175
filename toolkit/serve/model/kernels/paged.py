"""One decoding token a sequence against its KV blocks, in Triton: the kernel and its launch.

It is compiled for NVIDIA GPUs and run by Triton's interpreter in the tests; it has not run on a
GPU. paged.py has its reference and says what the arguments are.

A sequence's context is cut into spans of a fixed length, each of which a program of its own reads
with an online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867); a second kernel joins them
(Flash-Decoding, Dao et al. 2023). Spans do not depend on the batch, and so neither does the order
of a sequence's sums.

Shape suffixes: R query heads of one key-value head, padded to what tensor cores take, D head size,
padded, T tokens of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Tokens read at once: four blocks of 16.
_TILE = 64
# The fewest rows and columns of a matrix that tl.dot takes.
_FEWEST = 16


@triton.jit
def attend_spans(  # type: ignore[no-untyped-def]
    queries,
    keys,
    values,
    tables,
    lengths,
    mixed,
    weights,
    scale,
    query_stride,
    table_stride,
    length_stride,
    key_stride,
    value_stride,
    num_kv_heads,
    num_spans,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Mix one span of values for the query heads of one key-value head.

    Writes the mixture and the logarithm of its softmax's denominator.
    """
    sequence, head, span = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence * length_stride)
    begin = span * SPAN
    # The first span is written even of an empty sequence, as padding is: zeros.
    if (begin >= length) & (span > 0):
        return
    end = tl.minimum(begin + SPAN, length)
    row_R, dim_D, step_T = tl.arange(0, ROWS), tl.arange(0, DIMS), tl.arange(0, TILE)
    real_RD = (row_R < GROUP)[:, None] & (dim_D < HEAD)[None, :]
    at_RD = (head * GROUP + row_R)[:, None] * HEAD + dim_D[None, :]
    q_RD = tl.load(queries + sequence * query_stride + at_RD, mask=real_RD, other=0.0)
    best_R = tl.full([ROWS], float("-inf"), tl.float32)
    total_R = tl.zeros([ROWS], tl.float32)
    mixed_RD = tl.zeros([ROWS, DIMS], tl.float32)
    for start in range(begin, end, TILE):
        position_T = start + step_T
        live_T = position_T < end
        table = tables + sequence * table_stride + position_T // BLOCK
        block_T = tl.load(table, mask=live_T, other=0).to(tl.int64)
        offset_T = position_T % BLOCK
        live_TD = live_T[:, None] & (dim_D < HEAD)[None, :]
        at_TD = (head * BLOCK + offset_T)[:, None] * HEAD + dim_D[None, :]
        k_TD = tl.load(keys + (block_T * key_stride)[:, None] + at_TD, mask=live_TD, other=0.0)
        score_RT = tl.dot(q_RD, tl.trans(k_TD), input_precision="ieee") * scale
        score_RT = tl.where(live_T[None, :], score_RT, float("-inf"))
        higher_R = tl.maximum(best_R, tl.max(score_RT, 1))
        kept_R = tl.exp(best_R - higher_R)
        weight_RT = tl.exp(score_RT - higher_R[:, None])
        v_TD = tl.load(values + (block_T * value_stride)[:, None] + at_TD, mask=live_TD, other=0.0)
        part_RD = tl.dot(weight_RT.to(v_TD.dtype), v_TD, input_precision="ieee")
        mixed_RD = mixed_RD * kept_R[:, None] + part_RD
        total_R = total_R * kept_R + tl.sum(weight_RT, 1)
        best_R = higher_R
    row = (sequence * num_kv_heads + head) * GROUP + row_R
    at_R = row * num_spans + span
    share_RD = mixed_RD / tl.where(total_R > 0, total_R, 1.0)[:, None]
    share_RD = share_RD.to(mixed.dtype.element_ty)
    tl.store(mixed + at_R[:, None] * HEAD + dim_D[None, :], share_RD, mask=real_RD)
    tl.store(weights + at_R, best_R + tl.log(total_R), mask=row_R < GROUP)


@triton.jit
def join_spans(  # type: ignore[no-untyped-def]
    parts,
    weights,
    lengths,
    mixed,
    length_stride,
    num_heads,
    num_spans,
    HEAD: tl.constexpr,
    SPAN: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Add up the spans of one query head, each by its share of the whole softmax."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + sequence * length_stride)
    dim_D = tl.arange(0, DIMS)
    row = sequence * num_heads + head
    best, total = float("-inf"), 0.0
    mixed_D = tl.zeros([DIMS], tl.float32)
    for span in range(0, tl.cdiv(length, SPAN)):
        at = row * num_spans + span
        weight = tl.load(weights + at)
        higher = tl.maximum(best, weight)
        kept, added = tl.exp(best - higher), tl.exp(weight - higher)
        part_D = tl.load(parts + at * HEAD + dim_D, mask=dim_D < HEAD, other=0.0)
        mixed_D = mixed_D * kept + part_D * added
        total = total * kept + added
        best = higher
    mixed_D = mixed_D / tl.where(total > 0, total, 1.0)
    tl.store(mixed + row * HEAD + dim_D, mixed_D.to(mixed.dtype.element_ty), mask=dim_D < HEAD)


def sizes(group_size: int, head_size: int) -> tuple[int, int]:
    """Return the rows and dims of a program's matrices: powers of two, as tl.dot takes them."""
    rows, dims = triton.next_power_of_2(group_size), triton.next_power_of_2(head_size)
    return max(_FEWEST, rows), max(_FEWEST, dims)


def launch(
    q_BHD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    span: int,
    num_spans: int,
) -> torch.Tensor:
    """Return `[B, H * D]`; see paged.attend. Nothing here waits for the device."""
    num_sequences, num_heads, head_size = q_BHD.shape
    num_kv_heads, block_size = keys.shape[1:3]
    assert q_BHD.stride()[1:] == (head_size, 1), "a token's heads are not next to each other"
    assert tables.stride(1) == 1, "a sequence's block numbers are not next to each other"
    rows, dims = sizes(num_heads // num_kv_heads, head_size)
    mixed = q_BHD.new_empty(num_sequences, num_heads * head_size)
    parts = (
        mixed
        if num_spans == 1
        else q_BHD.new_empty(num_sequences * num_heads * num_spans * head_size, dtype=torch.float32)
    )
    weights = q_BHD.new_empty(num_sequences * num_heads * num_spans, dtype=torch.float32)
    attend_spans[(num_sequences, num_kv_heads, num_spans)](
        *(q_BHD, keys, values, tables, lengths, parts, weights, scale),
        *(q_BHD.stride(0), tables.stride(0), lengths.stride(0), keys.stride(0), values.stride(0)),
        *(num_kv_heads, num_spans),
        GROUP=num_heads // num_kv_heads,
        HEAD=head_size,
        BLOCK=block_size,
        SPAN=span,
        TILE=_TILE,
        ROWS=rows,
        DIMS=dims,
    )
    if num_spans > 1:
        join_spans[(num_sequences, num_heads)](
            *(parts, weights, lengths, mixed, lengths.stride(0), num_heads, num_spans),
            HEAD=head_size,
            SPAN=span,
            DIMS=dims,
        )
    return mixed
