"""Regular layouts recognised, and their cheapest path lowered to collectives.

What a rank holds or wants in several parts is first put together, so that co-sharded operators and
tensors with several readers on one rank are seen as the one part they amount to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from toolkit.plan.materialize.adapter import Adapter, Buffer, Builder, Kind
from toolkit.plan.materialize.direct import deliver
from toolkit.plan.rvd import between, layouts, search
from toolkit.plan.rvd.between import Crossing, Route
from toolkit.plan.rvd.layouts import Placed
from toolkit.plan.rvd.moves import Move, full_bytes
from toolkit.plan.rvd.prices import Prices, Ranks
from toolkit.plan.rvd.search import MOST_AXES, Path
from toolkit.plan.rvd.transfers import Holding, Transfer
from toolkit.plan.tensors import Chunk, Mask, PTensor, VTensor, missing

Held = Mapping[int, Mask]  # rank -> what it holds, or wants


def together(masks: Sequence[Mask], *, adds_up: bool) -> Mask | None:
    """Return the one mask that masks of a rank amount to, or None.

    Parts that are produced have to add up (`adds_up`); parts that are wanted may overlap.
    """
    distinct = sorted(set(masks))
    parts = [
        a for a in distinct if not any(a != b and a.chunk == b.chunk and a in b for b in distinct)
    ]
    if len(parts) == 1:
        return parts[0]
    box = tuple(
        (min(part.box[dim][0] for part in parts), max(part.box[dim][1] for part in parts))
        for dim in range(len(parts[0].box))
    )
    low, high = min(p.chunk.low for p in parts), max(p.chunk.high for p in parts)
    scale = math.lcm(low.denominator, high.denominator)
    whole = Mask(box, Chunk(int(low * scale), int(high * scale), scale))
    if adds_up:
        size = sum(((p.chunk.high - p.chunk.low) * p.numel for p in parts), Fraction(0))
        return whole if size == (high - low) * whole.numel and _disjoint(parts) else None
    if any(part.chunk != parts[0].chunk for part in parts):
        return None
    inside = [Mask(part.within(whole)) for part in parts]
    return None if missing(PTensor("part", whole.shape), inside) else whole


def _disjoint(masks: Sequence[Mask]) -> bool:
    return all((a & b) is None for i, a in enumerate(masks) for b in masks[:i])


def by_rank(views: Sequence[VTensor], *, adds_up: bool) -> dict[int, Mask] | None:
    """Return the one mask each rank holds (or wants), or None where one has several."""
    masks: dict[int, list[Mask]] = {}
    for view in views:
        masks.setdefault(view.rank, []).append(view.mask)
    found: dict[int, Mask] = {}
    for rank, several in masks.items():
        one = together(several, adds_up=adds_up)
        if one is None:
            return None
        found[rank] = one
    return found


def alone(shape: tuple[int, ...], held: Held) -> tuple[Ranks, Placed] | None:
    """Return (ranks in order, layout) of what the ranks hold, or None when it is not regular."""
    found = layouts.align(shape, held, held)
    return (found[0], found[1]) if found else None


def way(
    tensor: PTensor, held: Held, wanted: Held, prices: Prices, *, at_once: bool = False
) -> Path | Route | None:
    """Return the cheapest way between two regular layouts, or None where either is not."""
    if set(held) == set(wanted):
        aligned = layouts.align(tensor.shape, held, wanted)
        if aligned and len(aligned[1].axes) <= MOST_AXES:
            ranks, source, target = aligned
            return search.find(
                tensor.shape, tensor.item_bytes, ranks, source, target, prices, at_once=at_once
            )
    one, other = alone(tensor.shape, held), alone(tensor.shape, wanted)
    if one is None or other is None or max(len(one[1].axes), len(other[1].axes)) > MOST_AXES:
        return None
    return between.find(tensor.shape, tensor.item_bytes, *one, *other, prices)


def build(
    builder: Builder,
    inputs: Sequence[Buffer],
    held: Held,
    consumers: Sequence[VTensor],
    found: Path | Route,
    prices: Prices,
) -> Adapter:
    """Return the adapter that takes `found`, from the input buffers to the consumers' parts."""
    current: dict[int, Buffer] = {}
    for rank, mask in held.items():
        parts = _needed([buffer for buffer in inputs if buffer.rank == rank])
        current[rank] = builder.local(rank, mask, parts)
    builder.end_phase()
    lowering = _Lowering(builder, prices, current)
    if isinstance(found, Path):
        lowering.path(found)
    else:
        lowering.path(found.first)
        lowering.crossing(found.crossing)
        lowering.path(found.last)
    outputs = []
    for view in consumers:
        source = lowering.current[view.rank]
        inside = Mask(view.mask.box, source.mask.chunk)
        outputs.append(builder.local(view.rank, inside, (source,)))
    builder.end_phase()
    return builder.done(
        str(found),
        tuple(buffer.name for buffer in inputs),
        tuple(buffer.name for buffer in outputs),
    )


def _needed(buffers: Sequence[Buffer]) -> tuple[Buffer, ...]:
    """The buffers of a rank without those that others hold already."""
    kept: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda buffer: -buffer.mask.numel):
        same = (other for other in kept if other.mask.chunk == buffer.mask.chunk)
        if not any(buffer.mask in other.mask for other in same):
            kept.append(buffer)
    return tuple(sorted(kept, key=buffers.index))


class _Lowering:
    """Follows a path, keeping the buffer that each rank of the group has reached."""

    def __init__(self, builder: Builder, prices: Prices, current: dict[int, Buffer]) -> None:
        self.builder = builder
        self.prices = prices
        self.current = current
        self.shape = builder.tensor.shape

    def path(self, path: Path) -> None:
        for move, cost in zip(path.moves, path.costs, strict=True):
            after = Placed(path.axes, move.after)
            masks = dict(zip(path.ranks, after.masks(self.shape), strict=True))
            if move.kind == "permute":
                self._permute(path, move, masks)
            elif move.kind in ("slice", "pad", "vslice"):
                self._local(path, move, masks)
            else:
                self._collective(path, move, masks)
            self.builder.end_phase(cost)

    def _collective(self, path: Path, move: Move, masks: Mapping[int, Mask]) -> None:
        kind: Kind = move.kind  # type: ignore[assignment]
        before = dict(self.current)
        for ranks in path.groups(move):
            reads = tuple(before[rank] for rank in ranks)
            writes = tuple(self.builder.buffer(rank, masks[rank]) for rank in ranks)
            local = reads[0].mask.numel * self.builder.tensor.item_bytes
            num_bytes = full_bytes(kind, len(ranks), local)
            self.builder.step(
                kind, ranks, reads, writes, dim=move.dim, to_dim=move.to_dim,
                num_bytes=num_bytes, seconds=self.prices.collective(kind, num_bytes, [ranks]),
            )  # fmt: skip
            self.current.update(zip(ranks, writes, strict=True))

    def _local(self, path: Path, move: Move, masks: Mapping[int, Mask]) -> None:
        for ranks in path.groups(move):
            for index, rank in enumerate(ranks):
                source = self.current[rank]
                if move.kind != "vslice":
                    self.current[rank] = self.builder.local(rank, masks[rank], (source,))
                elif index:  # the first keeps the value, the others add nothing to it
                    self.current[rank] = self.builder.local(rank, masks[rank], ())

    def _permute(self, path: Path, move: Move, masks: Mapping[int, Mask]) -> None:
        before = dict(self.current)
        for source, target in move.pairs:
            ranks = (path.ranks[source], path.ranks[target])
            made = self.builder.buffer(ranks[1], masks[ranks[1]])
            num_bytes = made.mask.numel * self.builder.tensor.item_bytes
            seconds = self.prices.messages([(*ranks, num_bytes)])
            self.builder.step(
                "send", ranks, (before[ranks[0]],), (made,), num_bytes=num_bytes, seconds=seconds
            )
            self.current[ranks[1]] = made

    def crossing(self, crossing: Crossing) -> None:
        """Go over to the consumers' group."""
        before, self.current = self.current, {}
        if crossing.groups:
            self._broadcast(crossing, before)
            return
        wants: dict[int, list[Transfer]] = {rank: [] for rank, _ in crossing.wanted}
        for transfer in crossing.transfers:
            # What was searched as a layout lies in the buffer that the path has reached.
            rank = transfer.holding.rank
            holding = Holding(rank, transfer.holding.mask, before[rank].name)
            wants[transfer.to].append(Transfer(holding, transfer.to, transfer.mask))
        held = {buffer.name: buffer for buffer in before.values()}
        made = deliver(
            self.builder,
            held,
            [(rank, mask, wants[rank]) for rank, mask in crossing.wanted],
            self.prices,
        )
        self.current = {buffer.rank: buffer for buffer in made}

    def _broadcast(self, crossing: Crossing, before: Mapping[int, Buffer]) -> None:
        masks = dict(crossing.wanted)
        for rank in masks.keys() & before.keys():
            self.current[rank] = before[rank]
        for ranks in crossing.groups:
            writes = tuple(self.builder.buffer(rank, masks[rank]) for rank in ranks[1:])
            num_bytes = writes[0].mask.numel * self.builder.tensor.item_bytes
            seconds = self.prices.collective("broadcast", num_bytes, [ranks])
            self.builder.step(
                "broadcast", ranks, (before[ranks[0]],), writes,
                num_bytes=num_bytes, seconds=seconds,
            )  # fmt: skip
            self.current.update(zip(ranks[1:], writes, strict=True))
        self.builder.end_phase(crossing.cost)
