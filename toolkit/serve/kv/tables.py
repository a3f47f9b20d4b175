"""Which blocks each request holds: its block table from admission to release."""

from __future__ import annotations

from collections.abc import Iterable

from toolkit.serve.kv import prefix
from toolkit.serve.kv.blocks import BlockPool, BlockState
from toolkit.serve.request import Phase, Request


class BlockTables:
    """Fills, grows and empties `Request.block_ids` from one pool, sharing equal prefixes.

    `num_queried` and `num_hit` count prompt tokens at first admission: looked up, and found.
    """

    def __init__(self, pool: BlockPool, *, prefix_cache: bool) -> None:
        self.pool = pool
        self.prefix_cache = prefix_cache
        self.num_queried = 0
        self.num_hit = 0

    def reusable(self, request: Request) -> int:
        """Return how many of a waiting request's tokens the cache holds now."""
        return len(self._match(request)) * self.pool.block_size

    def lacking(self, request: Request, spare: int = 0) -> int:
        """Return how many blocks are wanting for `open` to succeed and leave `spare` free."""
        return self._lacking(request, self._match(request)) + spare

    def open(self, request: Request, spare: int = 0) -> bool:
        """Give a request blocks for every token known so far, or return False and change nothing.

        All at once, so that a started prefill never waits for memory. What is cached is shared and
        counts as computed, except that one token is always left, whose logits draw the next.
        """
        pool, found = self.pool, self._match(request)
        if self._lacking(request, found) + spare > 0:
            return False
        pool.take(found)
        fresh = pool.allocate(pool.blocks_for(request.num_tokens) - len(found), Phase.PREFILL)
        request.block_ids = found + fresh
        request.num_computed = len(found) * pool.block_size
        request.num_reusable = 0
        if request.scheduled_s is None:
            request.num_cached = request.num_computed
            if self._reads(request):
                self.num_queried += request.num_tokens
                self.num_hit += request.num_computed
        return True

    def is_coming(self, request: Request, residents: Iterable[Request]) -> bool:
        """Return whether a resident prefill is about to compute what `request` would do first.

        Computing it twice at once helps nobody: the request does better to wait and share it.
        """
        if not self._reads(request):
            return False
        at = len(self._match(request))
        if at >= self._num_shareable(request):
            return False
        wanted = request.block_names[at]
        return any(
            at < len(other.block_names) and other.block_names[at] == wanted
            for other in residents
            if other.phase is Phase.PREFILL and other.num_computed <= at * self.pool.block_size
        )

    def grow(self, request: Request) -> bool:
        """Make the block of the next decoded token writable; False when that takes a free one."""
        pool, index = self.pool, request.num_computed // self.pool.block_size
        if index < len(request.block_ids):
            # Half filled by the prefill: the first decoded token takes over its writing.
            if pool.state(request.block_ids[index]) is BlockState.READY:
                pool.begin_write(request.block_ids[index], Phase.DECODE)
            return True
        if not pool.num_free:
            return False
        request.block_ids += pool.allocate(1, Phase.DECODE)
        return True

    def advance(self, request: Request, end: int) -> None:
        """Note that tokens up to `end` lie in the cache, and publish the blocks this completes."""
        pool, size = self.pool, self.pool.block_size
        first, last = request.num_computed // size, end // size
        request.num_computed = end
        if first == last and request.phase is Phase.DECODE:
            return
        if not self.prefix_cache:
            pool.end_writes(request.block_ids[first:last])
            first = last
        for index in range(first, last):
            block = request.block_ids[index]
            pool.end_write(block)
            self._name(request, last)
            names = request.block_names
            parent = names[index - 1] if index else prefix.root(request.cache_salt)
            request.block_ids[index] = pool.publish(block, names[index], parent)
        # The prompt's last block is handed over half full; the first decoded token reopens it.
        if request.phase is Phase.PREFILL and not request.num_pending and end % size:
            pool.end_write(request.block_ids[last])

    def close(self, request: Request) -> None:
        """Take a request's blocks away; those that others may want stay cached."""
        self.pool.release(request.block_ids)
        request.block_ids = []
        request.num_computed = 0

    def _reads(self, request: Request) -> bool:
        # Scoring needs the logits of all the prompt's tokens, pooling their hidden states: neither
        # is kept.
        whole = request.pooled or request.sampling.prompt_logprobs is not None
        return self.prefix_cache and not whole

    def _num_shareable(self, request: Request) -> int:
        """Full blocks that may come from the cache: the last token is always computed."""
        return (request.num_tokens - 1) // self.pool.block_size

    def _match(self, request: Request) -> list[int]:
        if not self._reads(request):
            return []
        wanted = self._num_shareable(request)
        self._name(request, wanted)
        return self.pool.match(request.block_names[:wanted])

    def _name(self, request: Request, num_blocks: int) -> None:
        """Name a request's first `num_blocks` blocks, as far as that is not done yet."""
        names, size = request.block_names, self.pool.block_size
        for index in range(len(names), num_blocks):
            parent = names[-1] if names else prefix.root(request.cache_salt)
            names.append(prefix.name(parent, request.tokens(index * size, (index + 1) * size)))

    def _lacking(self, request: Request, found: list[int]) -> int:
        pool = self.pool
        needed = pool.blocks_for(request.num_tokens) - len(found)
        # What is found and idle counts as free only until it is taken.
        return needed - (pool.num_free - pool.num_idle(found))
