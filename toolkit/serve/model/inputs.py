"""A batch of slices as the arrays one forward pass reads, prepared once per step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from toolkit.serve.batch import Batch


@dataclass(frozen=True)
class StepInput:
    """All that a forward pass reads besides weights and cache; int32, one entry a token.

    `slots` is where a token's key and value go (block x block size + offset), `sample_rows` the
    rows whose logits are wanted, `pooled_rows` those whose last hidden states are. `sequences`
    `[sequences, 4]` holds first row, number of rows, position of the first, and where the
    sequence's block numbers begin in `tables`.
    """

    tokens: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    sample_rows: np.ndarray
    pooled_rows: np.ndarray
    sequences: np.ndarray
    tables: np.ndarray


def prepare(batch: Batch, block_size: int) -> StepInput:
    """Return the step's arrays; rows are the slices' tokens in batch order."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    sample_rows: list[int] = []
    pooled_rows: list[int] = []
    sequences: list[tuple[int, int, int, int]] = []
    tables: list[int] = []
    for piece in batch.slices:
        blocks = piece.request.block_ids
        sequences.append((len(tokens), piece.num_tokens, piece.start, len(tables)))
        tokens += piece.token_ids
        for position in range(piece.start, piece.end):
            positions.append(position)
            slots.append(blocks[position // block_size] * block_size + position % block_size)
        sample_rows += range(len(tokens) - piece.num_logits, len(tokens))
        if piece.request.pooled:
            pooled_rows += range(len(tokens) - piece.num_tokens, len(tokens))
        tables += blocks[: -(-piece.end // block_size)]
    lists = (tokens, positions, slots, sample_rows, pooled_rows, sequences, tables)
    return StepInput(*(np.array(values, np.int32) for values in lists))
