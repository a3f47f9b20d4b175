"""Gradients: the mirror of a tensor's producers and consumers, and what weights reduce over.

Who consumed a part forward produces its gradient backward, and the other way round. Operators that
read the same elements each add their share, so a replicated consumer makes a partial sum: that is
where all-reduce comes from (SuperScaler, arXiv 2301.08984, section 3.3). Replicas of one operator
add nothing new: they hold the same share. Partial sums that are consumed (a bias given in shares
to the parts of a split reduction) get the whole gradient each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from toolkit.errors import InfeasibleError
from toolkit.hardware.cluster import Cluster
from toolkit.plan.materialize.adapter import Adapter
from toolkit.plan.materialize.choose import materialize
from toolkit.plan.rvd.prices import AlphaBeta
from toolkit.plan.tensors import Box, Chunk, Mask, PTensor, VTensor, atoms


@dataclass(frozen=True)
class Mirror:
    """Views of a gradient: `producers[i]` is what forward consumer `of[i]` makes of it."""

    tensor: PTensor
    producers: tuple[VTensor, ...]
    of: tuple[int, ...]
    consumers: tuple[VTensor, ...]


def mirror(tensor: PTensor, producers: Sequence[VTensor], consumers: Sequence[VTensor]) -> Mirror:
    """Return who makes and who needs the gradient of a tensor.

    A consumer whose elements are read by differing numbers of others makes several partial sums,
    one a region. Raises InfeasibleError when consumed partial sums do not pair up.
    """
    gradient = PTensor(f"{tensor.name}.grad", tensor.shape, tensor.dtype)
    needs = tuple(VTensor(gradient, Mask(view.mask.box), view.rank, view.op) for view in producers)
    shares: dict[int, list[Mask]] = {index: [] for index in range(len(consumers))}
    for box, holders in atoms([view.mask.box for view in consumers]).items():
        for index, chunk in _shares(consumers, holders).items():
            shares[index].append(Mask(box, chunk))
    made, of = [], []
    for index, masks in shares.items():
        view = consumers[index]
        chunks = {mask.chunk for mask in masks}
        whole = [Mask(view.mask.box, chunks.pop())] if len(chunks) == 1 else masks
        for mask in whole:
            made.append(VTensor(gradient, mask, view.rank, view.op))
            of.append(index)
    return Mirror(gradient, tuple(made), tuple(of), needs)


def _shares(consumers: Sequence[VTensor], holders: Sequence[int]) -> dict[int, Chunk]:
    """Which share of the gradient of some elements each of their readers makes.

    The operators reading one family of partial sums make one share, the same one. Shares are
    numbered so that those of one rank are next to each other.
    """
    by_chunk: dict[Chunk, dict[str, list[int]]] = {}
    for index in holders:
        view = consumers[index]
        ops = by_chunk.setdefault(view.mask.chunk, {})
        ops.setdefault(view.op or f"#{index}", []).append(index)
    partial = sorted(chunk for chunk in by_chunk if not chunk.is_whole)
    families = {len(by_chunk[chunk]) for chunk in partial}
    if len(families) > 1 or sum(chunk.high - chunk.low for chunk in partial) not in (0, 1):
        names = ", ".join(str(consumers[index]) for index in holders[:4])
        raise InfeasibleError(
            f"the gradient of {consumers[holders[0]].tensor.name} is not defined: its partial "
            f"sums are read by {names}",
            remedy="let every partial sum be read by as many operators",
        )
    found = list(by_chunk.get(Chunk(0, 1, 1), {}).values())
    for several in zip(*(by_chunk[chunk].values() for chunk in partial), strict=True):
        found.append([index for indices in several for index in indices])
    found.sort(key=lambda indices: (min(consumers[index].rank for index in indices), indices))
    return {
        index: Chunk.part(number, len(found))
        for number, indices in enumerate(found)
        for index in indices
    }


def backward(
    tensor: PTensor,
    producers: Sequence[VTensor],
    consumers: Sequence[VTensor],
    cluster: Cluster,
) -> Adapter:
    """Return the adapter of a tensor's gradient, for the same views as its forward adapter.

    Its inputs are those of `mirror(...).producers`. Elements that nobody reads get zero.
    """
    views = mirror(tensor, producers, consumers)
    return materialize(views.tensor, views.producers, views.consumers, cluster, absent="zero")


@dataclass(frozen=True)
class Reducer:
    """The gradient of `mask` of a weight, summed over ranks once a step. Predicted, not measured.

    A reduce_scatter (ZeRO) leaves each rank 1/n of it, flat and padded to a multiple of n elements;
    `gather_s` is the all-gather of the updated weight that goes with it.
    """

    weight: str
    mask: Mask
    kind: Literal["all_reduce", "reduce_scatter"]
    ranks: tuple[int, ...]
    num_bytes: int
    seconds: float
    gather_s: float = 0.0


def reducers(
    weight: PTensor,
    consumers: Sequence[VTensor],
    cluster: Cluster,
    *,
    sharded: bool = False,
) -> tuple[Reducer, ...]:
    """Return over which ranks the gradient of each part of a weight is summed.

    Every rank holds the parts of the weight that its operators read. Ranks whose operators read the
    same elements share them; where they share only some, those are reduced apart from the rest.
    Replicas of an operator compute the same gradient, and are summed only with other operators'.
    Raises InfeasibleError when operators sharing elements are not replicated alike.
    """
    prices = AlphaBeta(cluster)
    kind: Literal["all_reduce", "reduce_scatter"] = "reduce_scatter" if sharded else "all_reduce"
    found = []
    for box, holders in _regions(consumers).items():
        groups = _groups(weight, box, consumers, holders)
        mask = Mask(box)
        num_bytes = mask.numel * weight.item_bytes
        if sharded and groups:
            num_bytes = -(-mask.numel // len(groups[0])) * len(groups[0]) * weight.item_bytes
        seconds = prices.collective(kind, num_bytes, groups) if groups else 0.0
        gather_s = prices.collective("all_gather", num_bytes, groups) if sharded and groups else 0.0
        for ranks in groups:
            found.append(Reducer(weight.name, mask, kind, ranks, num_bytes, seconds, gather_s))
    return tuple(found)


def _regions(consumers: Sequence[VTensor]) -> dict[Box, list[int]]:
    """Who reads which elements: parts as they are where they are equal or disjoint, else cut."""
    found = atoms([view.mask.box for view in consumers])
    for box in {view.mask.box for view in consumers}:
        inside = [atom for atom in found if Mask(atom) in Mask(box)]
        readers = {tuple(found[atom]) for atom in inside}
        if len(readers) == 1:
            for atom in inside:
                del found[atom]
            found[box] = list(readers.pop())
    return found


def _groups(
    weight: PTensor, box: Box, consumers: Sequence[VTensor], holders: Sequence[int]
) -> list[tuple[int, ...]]:
    """The ranks that sum up the gradient of the elements of a box, group by group."""
    shares = _shares(consumers, holders)
    held: dict[int, set[Chunk]] = {}
    for index, chunk in shares.items():
        held.setdefault(consumers[index].rank, set()).add(chunk)
    alike: dict[frozenset[Chunk], list[int]] = {}
    for rank in sorted(held):
        alike.setdefault(frozenset(held[rank]), []).append(rank)
    if len(alike) == 1:
        return []
    counted = sum(len(chunks) for chunks in alike)
    if counted != len(set(shares.values())) or len({len(ranks) for ranks in alike.values()}) > 1:
        names = ", ".join(str(consumers[index]) for index in holders[:6])
        raise InfeasibleError(
            f"{weight.name}{Mask(box)} is read by operators that are not replicated alike: {names}",
            remedy="replicate each of them over as many ranks, or split them all",
        )
    return list(zip(*alike.values(), strict=True))
