"""Several rankings into one: reciprocal rank fusion.

A passage's fused weight is the sum over rankings of 1 / (60 + its rank): Cormack, Clarke and
Buettcher 2009, SIGIR, whose constant 60 is kept. Ranks are compared, never scores, so cosines and
BM25's weights need no common scale.
"""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.rag.retriever import Hit

_CONSTANT = 60


def fuse(rankings: Sequence[Sequence[Hit]], k: int) -> list[Hit]:
    """Return the first `k` passages of all rankings by fused weight, then by id.

    A passage keeps the score of the first ranking that has it, so that cosines, given first, can
    still be compared with a threshold.
    """
    weights: dict[int, float] = {}
    hits: dict[int, Hit] = {}
    for ranking in rankings:
        for rank, hit in enumerate(ranking, start=1):
            weights[hit.passage.id] = weights.get(hit.passage.id, 0.0) + 1 / (_CONSTANT + rank)
            hits.setdefault(hit.passage.id, hit)
    order = sorted(weights, key=lambda passage_id: (-weights[passage_id], passage_id))
    return [hits[passage_id] for passage_id in order[:k]]
