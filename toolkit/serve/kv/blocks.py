"""A pool of KV blocks: reference counts, who may write to each block, and what may be found again.

A block's life is FREE -> PREFILL -> READY -> DECODE -> READY -> FREE: it has at most one writing
phase at a time, which is what lets two phases share one pool without locks on the data. A full
block may be published under the hash of its context; then nobody writes to it again, others may
share it, and without owners it is CACHED until its place is needed.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Sequence

from toolkit.errors import UsageError
from toolkit.serve.kv.prefix import PrefixIndex
from toolkit.serve.request import Phase


class BlockState(enum.Enum):
    """Who may touch a block's contents."""

    FREE = "free"
    PREFILL = "prefill"
    READY = "ready"
    DECODE = "decode"
    CACHED = "cached"


_WRITING = {Phase.PREFILL: BlockState.PREFILL, Phase.DECODE: BlockState.DECODE}
_WRITTEN = tuple(_WRITING.values())


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
        self._index = PrefixIndex()
        self.num_evictions = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be had: those free, and those cached without an owner."""
        return len(self._free) + self._index.num_idle

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by their content, owned or not."""
        return len(self._index)

    @property
    def version(self) -> int:
        """Changes whenever `match` may answer differently."""
        return self._index.version

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
        """Take `count` blocks for `phase` to write, evicting what was cached where none is free.

        The caller has checked `num_free`.
        """
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        free, references, states = self._free, self._references, self._states
        state = _WRITING[phase]
        taken = free[: -count - 1 : -1] if count else []
        del free[len(free) - len(taken) :]
        taken += [self._evict() for _ in range(count - len(taken))]
        for block in taken:
            assert references[block] == 0, f"block {block} was free and referenced"
            references[block] = 1
            states[block] = state
        return taken

    def begin_write(self, block: int, phase: Phase) -> None:
        """Let `phase` write to a READY block of a single owner."""
        assert self._states[block] is BlockState.READY, f"block {block} is {self._states[block]}"
        assert self._references[block] == 1, f"block {block} is shared and cannot be written"
        assert not self._index.holds(block), f"block {block} is published and cannot be written"
        self._states[block] = _WRITING[phase]

    def end_write(self, block: int) -> None:
        """Publish a block: whatever was written is complete and may be read by anyone."""
        assert self._states[block] in _WRITTEN, f"block {block} has no writer"
        self._states[block] = BlockState.READY

    def end_writes(self, blocks: Iterable[int]) -> None:
        """As `end_write`, of each."""
        states = self._states
        for block in blocks:
            assert states[block] in _WRITTEN, f"block {block} has no writer"
            states[block] = BlockState.READY

    def share(self, block: int) -> None:
        """Add an owner to a READY block."""
        assert self._states[block] is BlockState.READY, f"block {block} is {self._states[block]}"
        self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one owner of each block, the last first; without owners it is cached, or free."""
        references, states, index, free = self._references, self._states, self._index, self._free
        named = len(index)
        for block in reversed(blocks):
            left = references[block] - 1
            assert left >= 0, f"block {block} is freed twice"
            references[block] = left
            if left:
                continue
            if named and index.holds(block):
                states[block] = BlockState.CACHED
                index.rest(block)
            else:
                states[block] = BlockState.FREE
                free.append(block)

    # -- the prefix cache ------------------------------------------------------------------------

    def match(self, names: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest run of `names` from the first on that is cached."""
        return self._index.run(names)

    def num_idle(self, blocks: Iterable[int]) -> int:
        """Return how many of `blocks` have no owner, and so count as free until taken."""
        return sum(self._index.is_idle(block) for block in blocks)

    def num_sole(self, blocks: Iterable[int]) -> int:
        """Return how many of `blocks` can be had again once their present owner lets go."""
        return sum(self._references[block] == 1 for block in blocks)

    def take(self, blocks: Iterable[int]) -> None:
        """Add an owner to blocks that `match` has found."""
        references, states, index = self._references, self._states, self._index
        for block in blocks:
            if index.is_idle(block):
                index.wake(block)
                states[block] = BlockState.READY
            assert states[block] is BlockState.READY, f"block {block} is {states[block]}"
            references[block] += 1

    def publish(self, block: int, name: bytes, parent: bytes) -> int:
        """Let a full READY block be found by `name`; return the block that has the name now.

        Where another already has it, the owner gets a share of that one and gives its own back, so
        equal contexts are held once.
        """
        assert self._states[block] is BlockState.READY, f"block {block} is {self._states[block]}"
        known = self._index.find(name)
        if known is None:
            self._index.put(block, name, parent)
            return block
        if known != block:
            self.take([known])
            self.release([block])
        return known

    def forget(self) -> None:
        """Empty the cache: what the blocks without owners held is gone."""
        while self._index.num_idle:
            block = self._evict()
            self._states[block] = BlockState.FREE
            self._free.append(block)

    def _evict(self) -> int:
        self.num_evictions += 1
        return self._index.evict()

    def check_integrity(self, owners: Iterable[Iterable[int]]) -> None:
        """Raise AssertionError unless the blocks in `owners` account for the whole pool."""
        counted = Counter(block for blocks in owners for block in blocks)
        free = set(self._free)
        self._index.check_integrity()
        assert len(free) == len(self._free), "a block is listed free twice"
        assert len(free) + self._index.num_idle + self.num_used == self.num_blocks, "sums are off"
        for block in range(self.num_blocks):
            held, state = self._references[block], self._states[block]
            assert held == counted[block], (
                f"block {block}: {held} references, {counted[block]} owners"
            )
            idle = self._index.is_idle(block)
            assert (held == 0) == (block in free or idle), f"block {block} is lost"
            assert not (idle and block in free), f"block {block} is cached and free"
            assert (state is BlockState.FREE) == (block in free), f"block {block}: state {state}"
            assert (state is BlockState.CACHED) == idle, f"block {block}: state {state}"
            if self._index.holds(block):
                assert state not in _WRITING.values(), f"block {block} is cached and written to"
