"""Choosing how to materialise: in place, by collectives, or each part by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from toolkit.errors import UsageError
from toolkit.hardware.cluster import Cluster
from toolkit.plan.materialize import direct, regular
from toolkit.plan.materialize.adapter import Adapter, Buffer, Builder
from toolkit.plan.rvd.prices import AlphaBeta
from toolkit.plan.rvd.transfers import Holding, Market
from toolkit.plan.tensors import Mask, PTensor, VTensor, atoms, check_tiling, family

# Collectives that take as long as sends, but for rounding, are taken: they are fewer calls.
_TIE = 1 + 1e-6
# With more pairs of producers and consumers than this, collectives are not compared with sends.
_MANY = 4096


def materialize(
    tensor: PTensor,
    producers: Sequence[VTensor],
    consumers: Sequence[VTensor],
    cluster: Cluster,
    *,
    absent: Literal["refuse", "zero"] = "refuse",
    collectives: bool = False,
    at_once: bool = False,
) -> Adapter:
    """Return the cheapest predicted adapter that gives every consumer its part of a tensor.

    Producers may be replicas, slices and partial sums, on any ranks; so may consumers, whose
    partial sums add up to the tensor whichever way they are asked for. Elements that nobody
    produces are refused or, as in gradients, zero. With `collectives`, ranks that hold and want
    regular layouts among themselves use collectives even where sends are predicted to be quicker:
    libraries run them better than the prices know; with `at_once`, partial sums of the same ranks
    are summed by one all-reduce, which the caller may put in one buffer with others. Raises
    UsageError when the producers do not make the tensor, or a view is not of it.
    """
    for view in (*producers, *consumers):
        if view.tensor != tensor:
            raise UsageError(f"{view} is no part of {tensor.name} of shape {tensor.shape}")
    if absent == "refuse":
        check_tiling(tensor, producers)
    prices = AlphaBeta(cluster)
    builder, inputs = _start(tensor, producers)
    holdings = usable(producers)
    held = regular.by_rank(producers, adds_up=True)
    wanted = regular.by_rank(consumers, adds_up=False)
    holdings = usable(producers)
    found = None
    if held and wanted and not _in_place(holdings, consumers):
        found = regular.way(tensor, held, wanted, prices, at_once=at_once)
    many = len(producers) * len(consumers) > _MANY
    among = collectives and held is not None and wanted is not None and held.keys() == wanted.keys()
    if found is not None and held and (many or among):
        return regular.build(builder, inputs, held, consumers, found, prices)
    zeros = absent == "zero"
    plain = direct.build(builder, inputs, holdings, consumers, prices, zeros=zeros)
    if found is None or held is None:
        return plain
    if found.cost > plain.seconds * _TIE:
        return replace(plain, others={str(found): found.cost})
    builder, inputs = _start(tensor, producers)
    made = regular.build(builder, inputs, held, consumers, found, prices)
    return replace(made, others={plain.route: plain.seconds})


def _in_place(holdings: Sequence[Holding], consumers: Sequence[VTensor]) -> bool:
    """Whether every consumer's rank holds what it needs."""
    local: dict[int, list[Holding]] = {}
    for holding in holdings:
        local.setdefault(holding.rank, []).append(holding)
    return all(
        not Market(local.get(view.rank, ()), lambda _holder, _to: 0.0).cover(view.mask, view.rank)[
            1
        ]
        for view in consumers
    )


def _start(tensor: PTensor, producers: Sequence[VTensor]) -> tuple[Builder, list[Buffer]]:
    builder = Builder(tensor)
    inputs = [
        builder.buffer(view.rank, view.mask, f"p{index}") for index, view in enumerate(producers)
    ]
    return builder, inputs


def usable(producers: Sequence[VTensor]) -> list[Holding]:
    """Return what may be taken from each producer (by buffer name) so that it adds up.

    That is everything, unless elements are produced in several ways, say whole here and as partial
    sums there: then every element is taken one way, the one with the fewest partial sums.
    """
    found = atoms([view.mask.box for view in producers])
    ways = {box: {producers[i].mask.chunk for i in holders} for box, holders in found.items()}
    if all(sum(chunk.high - chunk.low for chunk in chunks) <= 1 for chunks in ways.values()):
        return [Holding(view.rank, view.mask, f"p{index}") for index, view in enumerate(producers)]
    holdings = []
    for box, holders in found.items():
        chosen = family(ways[box]) or ()
        for index in holders:
            view = producers[index]
            if view.mask.chunk in chosen:
                holdings.append(Holding(view.rank, Mask(box, view.mask.chunk), f"p{index}"))
    return holdings
