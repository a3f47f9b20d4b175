"""Blocks: handed out once, shared by count, written by one phase at a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import UsageError
from toolkit.serve.kv.blocks import BlockPool, BlockState
from toolkit.serve.request import Phase


def test_life_of_a_block() -> None:
    pool = BlockPool(2, 4)
    (block,) = pool.allocate(1, Phase.PREFILL)
    assert pool.state(block) is BlockState.PREFILL
    pool.end_write(block)
    pool.share(block)
    with pytest.raises(AssertionError, match="shared"):
        pool.begin_write(block, Phase.DECODE)
    pool.release([block])
    pool.begin_write(block, Phase.DECODE)
    with pytest.raises(AssertionError):
        pool.begin_write(block, Phase.PREFILL)
    pool.release([block])
    assert pool.num_free == 2
    with pytest.raises(AssertionError, match="freed twice"):
        pool.release([block])


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(UsageError, match="more memory"):
        BlockPool(0, 16)


@given(
    st.lists(st.tuples(st.sampled_from(["take", "share", "drop"]), st.integers(0, 7)), max_size=60)
)
def test_counts_always_add_up(moves: list[tuple[str, int]]) -> None:
    pool = BlockPool(8, 4)
    owners: list[list[int]] = []
    for move, number in moves:
        if move == "take" and pool.num_free >= number:
            blocks = pool.allocate(number, Phase.PREFILL)
            for block in blocks:
                pool.end_write(block)
            owners.append(blocks)
        elif move == "share" and owners:
            shared = owners[number % len(owners)]
            for block in shared:
                pool.share(block)
            owners.append(list(shared))
        elif move == "drop" and owners:
            pool.release(owners.pop(number % len(owners)))
        pool.check_integrity(owners)
        assert pool.num_free + pool.num_used == pool.num_blocks
        assert pool.usage == pool.num_used / 8


def test_a_leak_is_noticed() -> None:
    pool = BlockPool(4, 4)
    pool.allocate(1, Phase.PREFILL)
    with pytest.raises(AssertionError, match="1 references, 0 owners"):
        pool.check_integrity([])


def test_a_block_published_is_never_written_again() -> None:
    pool = BlockPool(2, 4)
    (block,) = pool.allocate(1, Phase.PREFILL)
    pool.end_write(block)
    assert pool.publish(block, b"name", b"root") == block
    with pytest.raises(AssertionError, match="published"):
        pool.begin_write(block, Phase.DECODE)
    pool.release([block])
    assert pool.state(block) is BlockState.CACHED
    assert pool.match([b"name", b"next"]) == [block]
