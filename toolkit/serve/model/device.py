"""The decoder on a torch device: weights in bf16 or fp16 there, and decoding that can be recorded.

On a GPU decoding tokens are attended by the Triton kernel, and chunks of prompts by torch's
scaled_dot_product_attention over their blocks; on a CPU by the kernel's reference and the same.
It has not run on a GPU.

Shape suffixes as in decoder.py, and B sequences of one token each, M blocks of the longest context,
S block size.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from toolkit.serve.model import paged
from toolkit.serve.model.config import DecoderConfig
from toolkit.serve.model.decoder import Attend, Decoder
from toolkit.serve.model.grouped import Weight, dense
from toolkit.serve.model.inputs import StepInput
from toolkit.serve.model.ranks import Ranks


class DeviceKV:
    """Per layer: keys and values `[blocks, K, S, D]`, so that a row of a head is read at once."""

    def __init__(
        self,
        config: DecoderConfig,
        num_blocks: int,
        block_size: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.block_size = block_size
        shape = (num_blocks, config.num_kv_heads, block_size, config.head_size)
        # Zeros: what nobody has written yet is masked, and 0 x NaN would be NaN.
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
            for _ in range(2)
        )

    @property
    def num_bytes(self) -> int:
        return sum(pool.nbytes for pool in (*self.keys, *self.values))

    def write(
        self,
        layer: int,
        blocks_N: torch.Tensor,
        offsets_N: torch.Tensor,
        key_NKD: torch.Tensor,
        value_NKD: torch.Tensor,
    ) -> None:
        """Store one key and value per token at its block and offset there."""
        self.keys[layer][blocks_N, :, offsets_N] = key_NKD
        self.values[layer][blocks_N, :, offsets_N] = value_NKD

    def read(self, layer: int, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values `[K, C, D]` of one block table."""
        keys, values = self.keys[layer][table], self.values[layer][table]
        return keys.transpose(0, 1).flatten(1, 2), values.transpose(0, 1).flatten(1, 2)

    def clear(self) -> None:
        """Let go of the memory."""
        self.keys.clear()
        self.values.clear()


@dataclass(frozen=True)
class Singles:
    """The newest token of every sequence: int32 on the device. All that decoding reads of a step.

    `lengths` `[B]` count that token; 0 is padding, which writes to the first block of its table.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor


@dataclass(frozen=True)
class _Chunk:
    """A stretch of a prompt: its rows of the step, its blocks, and what each token may see.

    `seen` `[T, C]` is None where the chunk begins its prompt: then it is a triangle.
    """

    rows: slice
    table: torch.Tensor
    context: int
    seen: torch.Tensor | None


class DeviceDecoder(Decoder):
    """A decoder whose weights, cache and arithmetic are on `device` in `dtype`."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: MutableMapping[str, Weight],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Empty `weights` (`loaded.expected`'s names) onto the device.

        Where they are a part (part.py), `ranks` must be set before the first step.
        """
        self.device = device
        self.ranks: Ranks | None = None
        for name in list(weights):
            weights[name] = dense(weights[name]).to(device, dtype)
        super().__init__(config, weights, kv_dtype=dtype)
        self._cos, self._sin = self._cos.to(device, dtype), self._sin.to(device, dtype)
        self.dtype = str(dtype).removeprefix("torch.")
        self.kernels = "Triton" if device.type == "cuda" else "torch"

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as held: here a tied embedding is the head itself."""
        return super().weight_bytes - (self.embedding.nbytes if self.config.tied_head else 0)

    def make_cache(self, num_blocks: int, block_size: int) -> DeviceKV:  # type: ignore[override]
        """Return a KV cache as this decoder reads it."""
        return DeviceKV(
            self.config, num_blocks, block_size, device=self.device, dtype=self.kv_dtype
        )

    @torch.inference_mode()
    def decode(self, singles: Singles, cache: DeviceKV) -> torch.Tensor:
        """Return float32 logits `[B, V]`; the KV of every token is in `cache` afterwards.

        Nothing here depends on numbers that are known only on the device, so that a recording of
        it serves every step of as many sequences.
        """
        positions_B = (singles.lengths - 1).clamp(min=0).long()
        places_B1 = (positions_B // cache.block_size).unsqueeze(1)
        blocks_B = singles.tables.gather(1, places_B1).squeeze(1).long()
        offsets_B = positions_B % cache.block_size

        def attend(layer: int, qkv_BHD: torch.Tensor) -> torch.Tensor:
            q_BHD, k_BKD, v_BKD = self._parted(qkv_BHD)
            cache.write(layer, blocks_B, offsets_B, k_BKD, v_BKD)
            return self._attend_singles(layer, q_BHD, singles, cache)

        return self._logits(self._walk(singles.tokens, positions_B, attend))

    def _attention(self, step: StepInput, cache: DeviceKV) -> Attend:  # type: ignore[override]
        """Return one step's attention: lone tokens by the kernel, chunks of prompts one by one."""
        slots_N = self._placed(step.slots).long()
        blocks_N, offsets_N = slots_N // cache.block_size, slots_N % cache.block_size
        lone = step.sequences[step.sequences[:, 1] == 1]
        singles, rows_B = self._singles(step, lone, cache), self._placed(lone[:, 0]).long()
        chunks = [
            self._chunk(step, first, rows, start, table, cache)
            for first, rows, start, table in step.sequences.tolist()
            if rows > 1
        ]

        def attend(layer: int, qkv_NHD: torch.Tensor) -> torch.Tensor:
            q_NHD, k_NKD, v_NKD = self._parted(qkv_NHD)
            cache.write(layer, blocks_N, offsets_N, k_NKD, v_NKD)
            mixed_NE = q_NHD.new_empty(len(q_NHD), q_NHD.shape[1] * q_NHD.shape[2])
            if len(lone):
                mixed_NE[rows_B] = self._attend_singles(layer, q_NHD[rows_B], singles, cache)
            for chunk in chunks:
                mixed_NE[chunk.rows] = self._attend_chunk(layer, q_NHD[chunk.rows], chunk, cache)
            return mixed_NE

        return attend

    def _whole(self, part_NE: torch.Tensor) -> torch.Tensor:
        return part_NE if self.ranks is None else self.ranks.add(part_NE)

    def _logits(self, x_NE: torch.Tensor) -> torch.Tensor:
        logits_NV = super()._logits(x_NE)
        if self.ranks is not None:
            logits_NV = self.ranks.join(logits_NV)[:, : self.config.vocab_size]
        return logits_NV.float()

    def _parted(self, qkv_NHD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        return qkv_NHD.split((heads, kv_heads, kv_heads), dim=1)

    def _placed(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(numbers).to(self.device)

    def _singles(self, step: StepInput, lone: np.ndarray, cache: DeviceKV) -> Singles:
        """Return the sequences `lone` (rows of `step.sequences`) as decoding reads them."""
        lengths = lone[:, 2] + 1
        num_blocks = -(-lengths // cache.block_size)
        tables = np.zeros((len(lone), num_blocks.max(initial=1)), np.int32)
        for row, (count, at) in enumerate(zip(num_blocks, lone[:, 3], strict=True)):
            tables[row, :count] = step.tables[at : at + count]
        numbers = (step.tokens[lone[:, 0]], lengths, tables)
        return Singles(*(self._placed(each) for each in numbers))

    def _chunk(
        self, step: StepInput, first: int, rows: int, start: int, table: int, cache: DeviceKV
    ) -> _Chunk:
        context = start + rows
        blocks = step.tables[table : table + -(-context // cache.block_size)]
        seen_TC = None
        if start:
            ones_TC = torch.ones(rows, context, dtype=torch.bool, device=self.device)
            seen_TC = ones_TC.tril_(start)
        return _Chunk(slice(first, first + rows), self._placed(blocks), context, seen_TC)

    def _attend_singles(
        self, layer: int, q_BHD: torch.Tensor, singles: Singles, cache: DeviceKV
    ) -> torch.Tensor:
        pools = cache.keys[layer], cache.values[layer]
        return paged.attend(q_BHD, *pools, singles.tables, singles.lengths)

    def _attend_chunk(
        self, layer: int, q_THD: torch.Tensor, chunk: _Chunk, cache: DeviceKV
    ) -> torch.Tensor:
        """Return a chunk's attention `[T, H * D]` over its context's blocks, put side by side."""
        k_HCD, v_HCD = (
            held[:, : chunk.context].repeat_interleave(self.config.group_size, dim=0)
            for held in cache.read(layer, chunk.table)
        )
        mixed_1HTD = F.scaled_dot_product_attention(
            q_THD.transpose(0, 1).unsqueeze(0),
            k_HCD.unsqueeze(0),
            v_HCD.unsqueeze(0),
            attn_mask=chunk.seen,
            is_causal=chunk.seen is None,
        )
        return mixed_1HTD[0].transpose(0, 1).flatten(1)
