"""Simulated text: which tokens are equal, and nothing else about them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import overload


class Text(Sequence[int]):
    """Stretches of one token each, repeated: as long as a prompt, in the memory of its history.

    Two texts are equal where their stretches are, which is all a prefix cache looks at.

    >>> said = Text().plus(7, 2).plus(9, 1)
    >>> list(said), said[1:3], len(said)
    ([7, 7, 9], [7, 9], 3)
    """

    __slots__ = ("_ends", "_tokens")

    def __init__(self, ends: tuple[int, ...] = (), tokens: tuple[int, ...] = ()) -> None:
        self._ends = ends
        self._tokens = tokens

    def plus(self, token: int, num: int) -> Text:
        """Return this text followed by `num` times a token."""
        return Text((*self._ends, len(self) + num), (*self._tokens, token))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> list[int]: ...
    def __getitem__(self, at: int | slice) -> int | list[int]:
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            assert step == 1, "a text is read forwards"
            return self._between(start, stop)
        at = at + len(self) if at < 0 else at
        if not 0 <= at < len(self):
            raise IndexError(at)
        return self._tokens[bisect_right(self._ends, at)]

    def _between(self, start: int, stop: int) -> list[int]:
        found: list[int] = []
        index = bisect_right(self._ends, start)
        while start < stop:
            end = min(stop, self._ends[index])
            found += [self._tokens[index]] * (end - start)
            start, index = end, index + 1
        return found
