"""Lookahead beside a stream: on a thread of its own, told of each piece, ended by the search.

A generation that leads to a search says what that search would be with the text so far (`Towards`).
Embedding and ranking that happen here, so the stream is read on without a pause; the lists come in
through the tiers' readers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, cast, get_args

import numpy as np

from toolkit.errors import ToolkitError, unknown_name
from toolkit.log import get_logger
from toolkit.rag.prefetch import Ahead, Lookahead
from toolkit.rag.retriever import Retriever

_log = get_logger(__name__)

# The text so far -> what would be searched with it: a query, and documents to take the mean with.
Towards = Callable[[str], tuple[str, Sequence[str]]]

# off: lists are read when the search asks. question: ranked once, by the question (TeleRAG).
# progressive: ranked again on the text so far, the budget spent in instalments.
Mode = Literal["off", "question", "progressive"]
_INSTALMENTS: dict[str, int] = {"question": 1, "progressive": 4}


def find_mode(name: str) -> Mode:
    """Return the mode of that name. Raises UsageError naming the nearest.

    >>> find_mode("off")
    'off'
    """
    if name not in get_args(Mode):
        raise unknown_name("lookahead", name, get_args(Mode))
    return cast("Mode", name)


class Foresight:
    """The lookahead of one generation, on its own thread. `close` it, whatever happens."""

    def __init__(
        self,
        retriever: Retriever,
        towards: Towards,
        *,
        mode: Mode,
        nprobe: int,
        num_tokens: int,
        multiple: float,
    ) -> None:
        """Begin at once, with what the search would be if nothing was generated."""
        self._retriever, self._towards = retriever, towards
        self._num_tokens = 0
        self._seconds = 0.0
        self._lookahead = Lookahead(
            retriever.tiers, retriever.pace, nprobe=nprobe, multiple=multiple,
            num_instalments=_INSTALMENTS[mode],
        )  # fmt: skip
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="foresight")
        self._busy: Future[None] = self._pool.submit(self._begin, num_tokens)

    def feed(self, num_tokens: int, text: str) -> None:
        """Take note that so many tokens are there; rank anew when an instalment is due."""
        self._num_tokens = num_tokens
        if self._busy.done() and self._lookahead.due(num_tokens):
            self._busy = self._pool.submit(self._revise, text)

    def ended(self, seconds: float) -> None:
        """Take note that the generation took so long; nothing is ranked after it."""
        self._seconds = seconds
        self._pool.shutdown(wait=True, cancel_futures=True)

    def settle(self, probes: np.ndarray) -> Ahead:
        """Return what it was good for: the search's lists are known now. Search, then `close`."""
        return self._lookahead.settle(probes, self._seconds, self._num_tokens)

    def close(self) -> None:
        """Drop what still waits to be read."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._lookahead.__exit__(None, None, None)

    def _begin(self, num_tokens: int) -> None:
        self._quietly(lambda: self._lookahead.begin(self._vector(""), num_tokens))

    def _revise(self, text: str) -> None:
        self._quietly(lambda: self._lookahead.revise(self._vector(text)))

    def _vector(self, text: str) -> np.ndarray:
        return self._retriever.vector(*self._towards(text))

    def _quietly(self, step: Callable[[], None]) -> None:
        """Lookahead may fail, and the search that follows will say why: it is only a head start."""
        try:
            step()
        except ToolkitError as error:
            _log.warning("lookahead: %s", error)
