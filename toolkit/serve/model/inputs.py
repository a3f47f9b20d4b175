"""A batch of slices as the tensors one forward pass reads, prepared once per step.

Shape suffixes as in decoder.py: N tokens of the step, B sequences of a group, T tokens of a chunk,
C context tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from toolkit.serve.batch import Batch, Slice
from toolkit.serve.request import Phase


@dataclass(frozen=True)
class Chunk:
    """Rows [first, last) of the step: consecutive tokens of one prompt.

    `table` (block numbers `[1, blocks]`) and the additive `mask` `[T, C]` are None for a prompt's
    first chunk, which reads nothing but itself.
    """

    first: int
    last: int
    table: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences of similar context that decode one token each, attended to as one batch.

    `rows` are their rows in the step, `tables` their block numbers `[B, blocks]` (padded with
    0), `context` the longest context. `mask` `[B, 1, 1, C]` is 0 at a sequence's own tokens, else
    -inf; None when all contexts are equally long.
    """

    rows: torch.Tensor
    tables: torch.Tensor
    context: int
    mask: torch.Tensor | None


@dataclass(frozen=True)
class StepInput:
    """All that a forward pass reads besides weights and cache."""

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    sample_rows: torch.Tensor
    pooled_rows: torch.Tensor
    chunks: tuple[Chunk, ...]
    groups: tuple[DecodeGroup, ...]


def prepare(batch: Batch, block_size: int) -> StepInput:
    """Return the step's tensors; rows are the slices' tokens in batch order."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    sample_rows: list[int] = []
    pooled_rows: list[int] = []
    chunks: list[Chunk] = []
    decoding: dict[int, list[tuple[int, Slice]]] = {}
    for piece in batch.slices:
        first, blocks = len(tokens), piece.request.block_ids
        tokens += piece.token_ids
        positions += range(piece.start, piece.end)
        slots += [
            blocks[position // block_size] * block_size + position % block_size
            for position in range(piece.start, piece.end)
        ]
        sample_rows += range(len(tokens) - piece.num_logits, len(tokens))
        if piece.request.pooled:
            pooled_rows += range(first, len(tokens))
        if piece.phase is Phase.PREFILL:
            chunks.append(_chunk(piece, first, block_size))
        else:
            # Grouped by powers of two, so that padding at most doubles what is read.
            num_blocks = -(-piece.end // block_size)
            decoding.setdefault((num_blocks - 1).bit_length(), []).append((first, piece))
    return StepInput(
        torch.tensor(tokens),
        torch.tensor(positions),
        torch.tensor(slots),
        torch.tensor(sample_rows, dtype=torch.long),
        torch.tensor(pooled_rows, dtype=torch.long),
        tuple(chunks),
        tuple(_group(members, block_size) for members in decoding.values()),
    )


def _chunk(piece: Slice, first: int, block_size: int) -> Chunk:
    last = first + piece.num_tokens
    if piece.start == 0:
        return Chunk(first, last, None, None)
    table = torch.tensor([piece.request.block_ids[: -(-piece.end // block_size)]])
    mask_TC = torch.full((piece.num_tokens, piece.end), float("-inf")).triu_(piece.start + 1)
    return Chunk(first, last, table, mask_TC)


def _group(members: Sequence[tuple[int, Slice]], block_size: int) -> DecodeGroup:
    ends = [piece.end for _, piece in members]
    context = max(ends)
    width = -(-context // block_size)
    tables = []
    for _, piece in members:
        blocks = piece.request.block_ids[:width]
        tables.append(blocks + [0] * (width - len(blocks)))
    mask_B11C = None
    if min(ends) < context:
        beyond_BC = torch.arange(context) >= torch.tensor(ends).unsqueeze(1)
        mask_BC = torch.zeros(beyond_BC.shape).masked_fill_(beyond_BC, float("-inf"))
        mask_B11C = mask_BC[:, None, None, :]
    rows_B = torch.tensor([row for row, _ in members])
    return DecodeGroup(rows_B, torch.tensor(tables), context, mask_B11C)
