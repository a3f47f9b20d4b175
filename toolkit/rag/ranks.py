"""Which lists a question wanted, and which it would have foreseen: what a simulation is made from.

Taken from a real index and real generations, played back (`rounds`): for each search, the ranking
by the question alone, by the text at a quarter, half and three quarters, and the lists searched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from toolkit.rag import pipelines
from toolkit.rag.foresight import Towards
from toolkit.rag.retriever import Hit, Retriever
from toolkit.rag.rounds import Recording, Replay
from toolkit.rag.session import Session

SHARES = (0.0, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Round:
    """A search, and the generation before it: its pieces, and the rankings at `SHARES` of it."""

    num_tokens: int
    rankings: tuple[tuple[int, ...], ...]  # best first, each of the same length; empty without text
    probes: tuple[int, ...]


class _Watch(Session):
    """A session that notes the rankings; its searches are real ones."""

    def __init__(self, *args: Any, depth: int, **how: Any) -> None:
        super().__init__(*args, **how)
        self.seen: list[Round] = []
        self._depth = depth
        self._before: tuple[Towards, list[str]] | None = None

    def generate(self, *args: Any, towards: Towards | None = None, **how: Any) -> str:
        text = super().generate(*args, **how)
        pieces = [piece for _, piece in self.rounds[-1].pieces]
        self._before = (towards, pieces) if towards else None
        return text

    def search_many(self, wanted: Sequence[tuple[str, Sequence[str]]]) -> list[list[Hit]]:
        found = super().search_many(wanted)
        probes = [self.retriever.rank(self.retriever.vector(*each), self.nprobe) for each in wanted]
        rankings: list[tuple[int, ...]] = []
        num_tokens = 0
        if self._before:
            towards, pieces = self._before
            num_tokens = len(pieces)
            for share in SHARES:
                text = "".join(pieces[: int(share * num_tokens)])
                vector = self.retriever.vector(*towards(text))
                rankings.append(tuple(self.retriever.rank(vector, self._depth).tolist()))
            self._before = None
        lists = np.unique(np.concatenate(probes))
        self.seen.append(Round(num_tokens, tuple(rankings), tuple(lists.tolist())))
        return found


def ranks(
    retriever: Retriever, recording: Recording, *, k: int, nprobe: int, depth: int
) -> tuple[Round, ...]:
    """Return the rounds of a recorded question on an index; rankings are `depth` lists long."""
    depth = min(depth, retriever.num_lists)
    replay = Replay(recording, slower=0)
    session = _Watch(retriever, replay, k=k, nprobe=nprobe, lookahead="off", depth=depth)
    with session:
        pipelines.find(recording.pipeline).run(session, recording.question)
    return tuple(session.seen)
