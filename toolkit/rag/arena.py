"""Host memory with a hard budget: one page-aligned mapping that lists come and go in.

It is one mapping, so that it can be pinned for a device once, and so that nothing can exceed it:
a read in flight has its place here before it begins. Places are whole pages, which is what direct
reads and checksums want.
"""

from __future__ import annotations

import bisect
import mmap

import numpy as np

from toolkit import units
from toolkit.errors import UsageError
from toolkit.rag.disk import ALIGN_BYTES
from toolkit.rag.segment import padded


class Arena:
    """Hands out contiguous places, best fit first, and joins neighbours that come back."""

    def __init__(self, budget_bytes: int) -> None:
        """Map `budget_bytes`, rounded down to whole pages. Pages cost nothing until written."""
        self.budget_bytes = budget_bytes // ALIGN_BYTES * ALIGN_BYTES
        if not self.budget_bytes:
            raise UsageError(
                f"a budget of {units.format_bytes(budget_bytes)} holds no page of "
                f"{units.format_bytes(ALIGN_BYTES)}",
                remedy="give more memory",
            )
        self._bytes = np.frombuffer(mmap.mmap(-1, self.budget_bytes), np.uint8)
        self.free_bytes = self.budget_bytes  # in holes, of whatever size
        self._taken: dict[int, int] = {}  # offset -> size
        self._holes = [(self.budget_bytes, 0)]  # (size, offset), ascending
        self._hole_at = {0: self.budget_bytes}  # offset -> size
        self._hole_before = {self.budget_bytes: 0}  # end -> offset

    @property
    def used_bytes(self) -> int:
        """The bytes of all places that are taken."""
        return self.budget_bytes - self.free_bytes

    def take(self, num_bytes: int) -> int | None:
        """Return the offset of a place for `num_bytes`, or None when no hole is large enough."""
        size = padded(num_bytes)
        at = bisect.bisect_left(self._holes, (size, -1))
        if at == len(self._holes):
            return None
        found, offset = self._holes[at]
        self._fill(offset, found)
        if found > size:
            self._dig(offset + size, found - size)
        self._taken[offset] = size
        self.free_bytes -= size
        return offset

    def give_back(self, offset: int) -> None:
        """Free the place at `offset`; views into it must not be used any more."""
        size = self._taken.pop(offset)
        self.free_bytes += size
        after = self._hole_at.get(offset + size)
        if after is not None:
            self._fill(offset + size, after)
            size += after
        before = self._hole_before.get(offset)
        if before is not None:
            self._fill(before, offset - before)
            offset, size = before, size + offset - before
        self._dig(offset, size)

    def view(self, offset: int, num_bytes: int) -> np.ndarray:
        """Return the bytes of a place, uint8 [num_bytes], writable."""
        return self._bytes[offset : offset + num_bytes]

    def _dig(self, offset: int, size: int) -> None:
        bisect.insort(self._holes, (size, offset))
        self._hole_at[offset] = size
        self._hole_before[offset + size] = offset

    def _fill(self, offset: int, size: int) -> None:
        del self._holes[bisect.bisect_left(self._holes, (size, offset))]
        del self._hole_at[offset]
        del self._hole_before[offset + size]
