"""Questions to passages: rank the lists, scan them, merge exactly.

    retrieve(): predict -> prefetch (while generating) -> search what is near, fetch what is missing
                -> merge exactly

Prediction and prefetch belong to a session (session.py); what is here is the state they share: a
store, the tiers that hold part of it in memory, the encoder, and the pace of disk and generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolkit import units
from toolkit.errors import UsageError
from toolkit.rag import filters
from toolkit.rag.corpus import Passage
from toolkit.rag.disk import DirectFile, Read
from toolkit.rag.embed import Encoder
from toolkit.rag.eviction import policy as find_policy
from toolkit.rag.prefetch import Pace
from toolkit.rag.search import Searched, search
from toolkit.rag.store import Store, read_manifest
from toolkit.rag.tiers import Tiers

BUDGET_BYTES = units.GIB


@dataclass(frozen=True)
class Hit:
    """A passage and its cosine similarity to the query (or another score, where one is fused)."""

    passage: Passage
    score: float


class Retriever:
    """An open index, the memory its lists share, and the encoder it was built with."""

    def __init__(self, store: Store, encoder: Encoder, tiers: Tiers) -> None:
        """Join the three; `encoder.info` must be the index's (`open` sees to it)."""
        self.store = store
        self.encoder = encoder
        self.tiers = tiers
        self.pace = Pace()
        self._chosen: dict[tuple[str, ...], tuple[int, Any]] = {}  # filters of one state

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        budget_bytes: int = BUDGET_BYTES,
        policy: str = "hotness",
        num_readers: int = 4,
        read: Read = DirectFile.read,
        encoder: Encoder | None = None,
    ) -> Retriever:
        """Open the index at `path` and load its encoder; lists take at most `budget_bytes`.

        Raises UsageError when there is no index, when it has no encoder, or the budget is less than
        its largest list; FormatError when it is not whole or the encoder has changed.
        """
        store = Store.open(path)
        recipe = store.manifest.recipe
        if recipe is None:
            raise UsageError(f"{path} holds vectors without an encoder, so it takes no questions")
        tiers = Tiers(
            store, budget_bytes=budget_bytes, policy=find_policy(policy), num_readers=num_readers,
            read=read,
        )  # fmt: skip
        return cls(store, encoder or Encoder.matching(recipe.encoder), tiers)

    @property
    def num_lists(self) -> int:
        """The lists of the index."""
        return self.store.quantizer.num_lists

    def refresh(self) -> bool:
        """Go on with the index's newest state, keeping what is in memory; say whether it changed.

        An index that was rebuilt with another encoder must be opened anew: UsageError.
        """
        manifest = read_manifest(self.store.path)
        if manifest == self.store.manifest:
            return False
        if not manifest.recipe or manifest.recipe.encoder != self.encoder.info:
            raise UsageError(f"{self.store.path} has another encoder now", remedy="open it anew")
        store = Store.open(self.store.path, after=self.store)
        self.tiers.follow(store)
        self.store = store
        return True

    def search(
        self, query: str, k: int = 5, nprobe: int | None = None, *, where: Sequence[str] = ()
    ) -> list[Hit]:
        """Return the `k` best passages for a query, searching `nprobe` lists.

        `nprobe` defaults to the index's own; the number of lists makes the search exhaustive.
        `where` are conditions on passages (filters.py).
        """
        return self.retrieve(self.vector(query), k, nprobe, among=self.among(where))

    def vector(self, query: str, documents: Sequence[str] = ()) -> np.ndarray:
        """Return the unit vector [dims] of a query, or of its mean with hypothetical documents.

        The mean is HyDE's (Gao et al. 2022, arXiv 2212.10496, section 3.2).
        """
        parts = [self.encoder.queries([query])]
        if documents:
            parts.append(self.encoder.documents(documents))
        mean = np.concatenate(parts).mean(axis=0)
        return (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32)

    def retrieve(
        self, vector: np.ndarray, k: int = 5, nprobe: int | None = None, *, among: Any = None
    ) -> list[Hit]:
        """Return the `k` best passages for a query's unit vector, of those in a filter if any."""
        (hits,), _ = self.retrieve_many([vector], k, nprobe, among=among)
        return hits

    def retrieve_many(
        self,
        vectors: Sequence[np.ndarray],
        k: int = 5,
        nprobe: int | None = None,
        *,
        among: Any = None,
    ) -> tuple[list[list[Hit]], Searched]:
        """Return the `k` best passages for each of several unit vectors, and where lists were.

        A list that several of them probe is read once and scanned for all.
        """
        store = self.store
        probes = [self.rank(vector, nprobe) for vector in vectors]
        found = search(self.tiers, np.stack(vectors), probes, k, among=among)
        hits = [
            [
                Hit(self.passage(int(i), store), float(score))
                for i, score in zip(each.ids, each.scores, strict=True)
            ]
            for each in found.found
        ]
        return hits, found

    def passage(self, passage_id: int, store: Store | None = None) -> Passage:
        """Return the passage of an id, of the newest state or of an earlier one."""
        return (store or self.store).passage(passage_id)

    def among(self, conditions: Sequence[str]) -> Any:
        """Return a filter for `retrieve`, of the passages that meet all conditions; None for none.

        Reads all passages once for each state of the index. Raises UsageError for what is no
        condition, and when no passage meets them.
        """
        if not conditions:
            return None
        key, sequence = tuple(conditions), self.store.manifest.sequence
        if self._chosen.get(key, (-1, None))[0] != sequence:
            found = filters.ids(self.store, [filters.Condition.parse(each) for each in conditions])
            if not len(found):
                raise UsageError(f"no passage meets {' and '.join(conditions)}")
            self._chosen[key] = (sequence, self.store.among(found))
        return self._chosen[key][1]

    def rank(self, vector: np.ndarray, nprobe: int | None = None) -> np.ndarray:
        """Return the lists that a search with this vector looks into, nearest first."""
        return self.store.quantizer.rank(vector, self.probes(nprobe))

    def probes(self, nprobe: int | None = None) -> int:
        """Return how many lists a search looks into. Raises UsageError when out of range."""
        if nprobe is None:
            recipe = self.store.manifest.recipe
            return recipe.nprobe if recipe else math.ceil(self.num_lists / 16)
        if not 1 <= nprobe <= self.num_lists:
            raise UsageError(
                f"nprobe is {nprobe}, and the index has {self.num_lists} lists",
                remedy=f"use 1 to {self.num_lists}",
            )
        return nprobe

    def file(self, passage: Passage) -> Path | None:
        """Return the file a passage was cut from, or None when its corpus has no files."""
        of = self.store.corpus(passage.id)
        return Path(of.root) / passage.source if of and of.root else None

    def close(self) -> None:
        """Stop the readers and let go of the files."""
        self.tiers.close()
        self.store.close()
