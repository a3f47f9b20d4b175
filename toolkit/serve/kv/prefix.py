"""What the blocks hold, by content: the index behind the prefix cache.

A full block is named by a hash over its tokens and the name of the block before it, so equal names
mean equal contexts from the first token on. A last block that is only partly filled has no name.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

# Wide enough that nobody can make two contexts meet: a wrong hit would leak another's text.
_DIGEST_BYTES = 16


def root(salt: str = "") -> bytes:
    """Return what the first block's name builds on; other salts share nothing."""
    return blake2b(salt.encode(), digest_size=_DIGEST_BYTES).digest()


def name(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the name of a full block of `token_ids` that follows the block named `parent`.

    >>> name(root(), [1, 2]) == name(root(), (1, 2))
    True
    >>> name(root(), [1, 2]) == name(root("mine"), [1, 2])
    False
    """
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=_DIGEST_BYTES).digest()


class PrefixIndex:
    """Names of blocks, and which of the named ones nobody owns, the longest unused first.

    An owner of a block owns all the blocks before it and lets go of the last one first, so in the
    order of release a block always comes before the one it builds on: children are evicted first.
    """

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, tuple[bytes, bytes]] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        # Changes with every block that is named or forgotten: what was looked up may be stale.
        self.version = 0

    def __len__(self) -> int:
        return len(self._block_of)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def find(self, wanted: bytes) -> int | None:
        """Return the block of that name, or None."""
        return self._block_of.get(wanted)

    def run(self, names: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest run of `names` from the first on."""
        found, get = [], self._block_of.get
        for each in names:
            block = get(each)
            if block is None:
                break
            found.append(block)
        return found

    def holds(self, block: int) -> bool:
        """Return whether `block` has a name."""
        return block in self._name_of

    def is_idle(self, block: int) -> bool:
        """Return whether `block` is kept only because it may be wanted again."""
        return block in self._idle

    def put(self, block: int, named: bytes, parent: bytes) -> None:
        """Name a block; the caller has looked that no other has this name."""
        self._block_of[named] = block
        self._name_of[block] = (named, parent)
        self.version += 1

    def rest(self, block: int) -> None:
        """Note that the last owner has let go of a named block."""
        self._idle[block] = None

    def wake(self, block: int) -> None:
        """Note that a block has an owner again."""
        self._idle.pop(block, None)

    def evict(self) -> int:
        """Forget the idle block released longest ago and return it."""
        block, _ = self._idle.popitem(last=False)
        named, _ = self._name_of.pop(block)
        del self._block_of[named]
        self.version += 1
        return block

    def check_integrity(self) -> None:
        """Raise AssertionError unless names are one to one and no block outlives its parent."""
        assert len(self._block_of) == len(self._name_of), "a block has two names, or a name two"
        order = {block: at for at, block in enumerate(self._idle)}
        for block, (named, parent) in self._name_of.items():
            assert self._block_of[named] == block, f"block {block} is found under another name"
            before = self._block_of.get(parent)
            if before is not None and before in order:
                assert block in order, f"block {block} is owned and its parent {before} is not"
                assert order[block] < order[before], f"block {before} would go before its child"
