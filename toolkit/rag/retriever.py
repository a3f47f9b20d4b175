"""Questions to passages: rank the lists, scan them, merge exactly.

    retrieve(): predict -> prefetch (while generating) -> search what is near, fetch what is missing
                -> merge exactly

In this first slice every list is in memory, so prediction is the ranking itself and nothing is
missing. What holds already is the result: exactly the best passages of the lists probed, in a total
order (score down, then id up).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from toolkit.errors import UsageError
from toolkit.rag.corpus import Passage
from toolkit.rag.embed import Encoder
from toolkit.rag.index import Index


@dataclass(frozen=True)
class Hit:
    """A passage and its cosine similarity to the query."""

    passage: Passage
    score: float


class Retriever:
    """An open index and the encoder it was built with."""

    def __init__(self, index: Index, encoder: Encoder) -> None:
        """Join the two; `encoder.info` must be the index's (`open` sees to it)."""
        self.index = index
        self.encoder = encoder

    @classmethod
    def open(cls, path: Path | str) -> Retriever:
        """Open the index at `path` and load its encoder.

        Raises UsageError when there is no index, FormatError when it is not whole or the encoder
        has changed.
        """
        index = Index.open(Path(path))
        return cls(index, Encoder.matching(index.manifest.encoder))

    def search(self, query: str, k: int = 5, nprobe: int | None = None) -> list[Hit]:
        """Return the `k` best passages for a query, searching `nprobe` lists.

        `nprobe` defaults to the index's own; the number of lists makes the search exhaustive.
        """
        return self.retrieve(self.vector(query), k, nprobe)

    def vector(self, query: str, documents: Sequence[str] = ()) -> np.ndarray:
        """Return the unit vector [dims] of a query, or of its mean with hypothetical documents.

        The mean is HyDE's (Gao et al. 2022, arXiv 2212.10496, section 3.2).
        """
        parts = [self.encoder.queries([query])]
        if documents:
            parts.append(self.encoder.documents(documents))
        mean = np.concatenate(parts).mean(axis=0)
        return (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32)

    def retrieve(self, vector: np.ndarray, k: int = 5, nprobe: int | None = None) -> list[Hit]:
        """Return the `k` best passages for a query's unit vector."""
        if k < 1:
            raise UsageError(f"k is {k}, and at least 1 passage must be asked for")
        lists = self.index.rank(vector, self.probes(nprobe))
        scores, ids = self.index.scan(vector, lists, k)
        return [
            Hit(self.index.passages[int(i)], float(score))
            for i, score in zip(ids, scores, strict=True)
        ]

    def probes(self, nprobe: int | None = None) -> int:
        """Return how many lists a search looks into. Raises UsageError when out of range."""
        num_lists = self.index.manifest.num_lists
        if nprobe is None:
            return self.index.manifest.nprobe
        if not 1 <= nprobe <= num_lists:
            raise UsageError(
                f"nprobe is {nprobe}, and the index has {num_lists} lists",
                remedy=f"use 1 to {num_lists}",
            )
        return nprobe

    def file(self, passage: Passage) -> Path | None:
        """Return the file a passage was cut from, or None when its corpus has no files."""
        root = self.index.manifest.corpus.root
        return Path(root) / passage.source if root else None
