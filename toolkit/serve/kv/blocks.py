"""A pool of KV blocks: reference counts, and who may write to each block.

A block's life is FREE -> PREFILL -> READY -> DECODE -> READY -> FREE: it has at most one writing
phase at a time, which is what lets two phases share one pool without locks on the data.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable

from toolkit.errors import UsageError
from toolkit.serve.request import Phase


class BlockState(enum.Enum):
    """Who may touch a block's contents."""

    FREE = "free"
    PREFILL = "prefill"
    READY = "ready"
    DECODE = "decode"


_WRITING = {Phase.PREFILL: BlockState.PREFILL, Phase.DECODE: BlockState.DECODE}


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each, handed out by number.

    >>> pool = BlockPool(num_blocks=4, block_size=16)
    >>> pool.allocate(2, Phase.PREFILL)
    [0, 1]
    >>> pool.num_free, pool.blocks_for(33)
    (2, 3)
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise UsageError(
                f"a KV cache of {num_blocks} blocks of {block_size} tokens holds nothing",
                remedy="give it more memory",
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Popped from the end: low numbers first, and the block freed last is reused first (warm).
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._states = [BlockState.FREE] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def capacity_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def usage(self) -> float:
        """The fraction of blocks in use, 0 to 1."""
        return self.num_used / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def state(self, block: int) -> BlockState:
        """Return who may write to `block`."""
        return self._states[block]

    def allocate(self, count: int, phase: Phase) -> list[int]:
        """Take `count` free blocks for `phase` to write. The caller has checked `num_free`."""
        assert count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            assert self._references[block] == 0, f"block {block} was free and referenced"
            self._references[block] = 1
            self._states[block] = _WRITING[phase]
        return taken

    def begin_write(self, block: int, phase: Phase) -> None:
        """Let `phase` write to a READY block of a single owner."""
        assert self._states[block] is BlockState.READY, f"block {block} is {self._states[block]}"
        assert self._references[block] == 1, f"block {block} is shared and cannot be written"
        self._states[block] = _WRITING[phase]

    def end_write(self, block: int) -> None:
        """Publish a block: whatever was written is complete and may be read by anyone."""
        assert self._states[block] in _WRITING.values(), f"block {block} has no writer"
        self._states[block] = BlockState.READY

    def share(self, block: int) -> None:
        """Add an owner to a READY block."""
        assert self._states[block] is BlockState.READY, f"block {block} is {self._states[block]}"
        self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one owner of each block; a block without owners is free."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is freed twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._states[block] = BlockState.FREE
                self._free.append(block)

    def check_integrity(self, owners: Iterable[Iterable[int]]) -> None:
        """Raise AssertionError unless the blocks in `owners` account for the whole pool."""
        counted = Counter(block for blocks in owners for block in blocks)
        free = set(self._free)
        assert len(free) == len(self._free), "a block is listed free twice"
        assert len(free) + self.num_used == self.num_blocks, "free and used do not add up"
        for block in range(self.num_blocks):
            held = self._references[block]
            assert held == counted[block], (
                f"block {block}: {held} references, {counted[block]} owners"
            )
            assert (held == 0) == (block in free), f"block {block} leaked, or is free and owned"
            assert (held == 0) == (self._states[block] is BlockState.FREE), f"block {block}: state"
