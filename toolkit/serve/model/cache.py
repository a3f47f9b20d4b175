"""The KV cache: blocks of keys and values of every layer, numbered by the scheduler's pool.

Shape suffixes: N tokens, B sequences, K key-value heads, D head size, C context tokens.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch

from toolkit.serve.model.config import DecoderConfig


class PagedKV:
    """Per layer: keys `[blocks, K, D, block size]`, values `[blocks, K, block size, D]`.

    Keys lie with tokens side by side, so that a vector instruction scores several at once. The
    last dim of each is padded to `lanes`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_blocks: int,
        block_size: int,
        *,
        lanes: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.block_size, self.head_size = block_size, config.head_size
        self.padded_block = -(-block_size // lanes) * lanes
        self.padded_head = -(-config.head_size // lanes) * lanes
        heads, layers = config.num_kv_heads, range(config.num_layers)
        keys = (num_blocks, heads, config.head_size, self.padded_block)
        values = (num_blocks, heads, block_size, self.padded_head)
        self.keys = [_zeros(keys, dtype) for _ in layers]
        self.values = [_zeros(values, dtype) for _ in layers]

    @property
    def num_bytes(self) -> int:
        return sum(pool.nbytes for pool in (*self.keys, *self.values))

    def write(
        self, layer: int, slots_N: torch.Tensor, key_NKD: torch.Tensor, value_NKD: torch.Tensor
    ) -> None:
        """Store one key and value per token at its slot (block x block size + offset)."""
        block_N, offset_N = slots_N // self.block_size, slots_N % self.block_size
        self.keys[layer][block_N, :, :, offset_N] = key_NKD.to(self.keys[layer].dtype)
        values = self.values[layer]
        values[block_N, :, offset_N, : self.head_size] = value_NKD.to(values.dtype)

    def read(self, layer: int, tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float32 keys and values `[B, K, C, D]` of block tables `[B, blocks]`."""
        keys = self.keys[layer][tables][..., : self.block_size]
        values = self.values[layer][tables][..., : self.head_size]
        return (
            keys.permute(0, 2, 1, 4, 3).flatten(2, 3).float(),
            values.transpose(1, 2).flatten(2, 3).float(),
        )

    def clear(self) -> None:
        """Let go of the memory."""
        self.keys.clear()
        self.values.clear()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return zeros, because padding is read, and 0 x NaN is NaN."""
    return torch.frombuffer(large_pages(math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


def large_pages(num_bytes: int) -> mmap.mmap:
    """Return zeroed memory that the system hands out as it is first written, in large pages if any.

    What is read here lies scattered or is streamed through, and every small page would be one more
    to look up.
    """
    pages = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Refused by kernels without large pages: then small ones do.
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
