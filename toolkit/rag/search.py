"""Exact search over lists that are partly in memory: scan what is near while the rest is read.

For probes P of a query, the result is the first k of all vectors in P that are not deleted, by
(score down, id up). That order is total and every score comes from the same scanner, so the result
is the same bytes whatever was resident, evicted or cancelled, in whatever order lists arrived, and
whoever else was searching: plain FAISS IVF's over the same probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from toolkit.errors import UsageError
from toolkit.rag.claims import Demand
from toolkit.rag.store import Key
from toolkit.rag.tiers import Tiers

# Candidates kept beyond k, so that equal scores at the k-th place rarely need a second scan.
_SPARE = 8


@dataclass(frozen=True)
class Found:
    """The result of one query, n <= k: scores float32 [n] and ids int64 [n], best first."""

    scores: np.ndarray
    ids: np.ndarray


@dataclass(frozen=True)
class Searched:
    """Results in the order of their queries, and where their lists were when they were wanted."""

    found: tuple[Found, ...]
    resident_bytes: int
    missing_bytes: int

    @property
    def hit_rate(self) -> float:
        """The share of the bytes that was in memory when it was wanted; 1 when none was."""
        wanted = self.resident_bytes + self.missing_bytes
        return self.resident_bytes / wanted if wanted else 1.0


def search(
    tiers: Tiers,
    queries_BD: np.ndarray,  # noqa: N803
    probes: Sequence[np.ndarray],
    k: int,
    *,
    among: Any = None,
) -> Searched:
    """Return the best `k` for each query [B, D] over the lists that `probes[b]` names.

    A list that several queries probe is read once and scanned for all of them while it is in the
    cache. `among` is a filter, made once by `store.among(ids)`: only those ids are found. Raises
    UsageError for k < 1, shapes that disagree, queries that are not finite and lists that are not
    there, and the error of a list that cannot be read or is corrupt: a result is exact or none.
    """
    store = tiers.store
    if k < 1:
        raise UsageError(f"k is {k}, and at least 1 passage must be asked for")
    if queries_BD.shape != (len(probes), store.quantizer.dims):
        raise UsageError(
            f"queries of shape {queries_BD.shape} for {len(probes)} sets of probes and an index "
            f"of {store.quantizer.dims} dims"
        )
    if not np.isfinite(queries_BD).all():
        raise UsageError("a query has values that are not finite, and nothing is near it")
    for lists in probes:
        if len(lists) and not 0 <= np.min(lists) <= np.max(lists) < store.quantizer.num_lists:
            raise UsageError(
                f"lists {np.min(lists)} to {np.max(lists)} to search",
                remedy=f"give numbers from 0 to {store.quantizer.num_lists - 1}",
            )
    alive = store.alive if among is None else among
    keys = [store.keys(np.unique(lists)) for lists in probes]
    # One more than there are vectors always has room for every tie.
    most = [1 + sum(map(store.num_held, each)) for each in keys]
    sizes = [min(k + _SPARE, limit) for limit in most]
    found: list[Found | None] = [None] * len(probes)
    where: Demand | None = None
    while left := [b for b, result in enumerate(found) if result is None]:
        scans = {b: store.quantizer.scan(queries_BD[b], sizes[b], alive) for b in left}
        askers: dict[Key, list[int]] = {}
        for b in left:
            for key in keys[b]:
                askers.setdefault(key, []).append(b)
        with tiers.demand(askers, store) as demand:
            for block in demand:
                for b in askers[block.key]:
                    scans[b].add(block.ids, block.codes)
        where = where or demand  # a second scan, for ties, is no second search
        for b in left:
            best = scans[b].best(k)
            if best is None:
                sizes[b] = min(2 * sizes[b], most[b])
            else:
                found[b] = Found(*best)
    return Searched(
        tuple(each for each in found if each),
        where.resident_bytes if where else 0,
        where.missing_bytes if where else 0,
    )
