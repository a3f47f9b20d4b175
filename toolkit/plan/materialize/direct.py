"""The direct way: every consumer's part from slices, sends and sums of producers' parts.

It takes any boxes, chunks and ranks (nnScaler's last resort); what a rank holds or has been sent
already is used first.
"""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.plan.materialize.adapter import Adapter, Buffer, Builder
from toolkit.plan.rvd.prices import Prices
from toolkit.plan.rvd.transfers import Holding, Market, Transfer
from toolkit.plan.tensors import Mask, VTensor

# The size of the message that tells which of several holders is near.
_PROBE_BYTES = 1 << 16


def build(
    builder: Builder,
    inputs: Sequence[Buffer],
    holdings: Sequence[Holding],
    consumers: Sequence[VTensor],
    prices: Prices,
    *,
    zeros: bool,
) -> Adapter:
    """Return the adapter; `holdings` name the input buffers. What nobody holds is zero, if `zeros`
    allows for that.
    """
    market = Market(holdings, Nearness(prices))
    wants: list[tuple[VTensor, list[Transfer]]] = []
    for consumer in consumers:
        found, absent = market.cover(consumer.mask, consumer.rank)
        assert zeros or not absent, f"nobody holds {absent[0]}"
        for transfer in found:
            if transfer.holding.rank != consumer.rank:
                name = transfer.holding.name
                market.add(Holding(consumer.rank, transfer.mask, name))
        wants.append((consumer, found))
    by_name = {buffer.name: buffer for buffer in inputs}
    outputs = deliver(
        builder, by_name, [(view.rank, view.mask, found) for view, found in wants], prices
    )
    route = "each part by sends" if any(s.kind == "send" for s in builder.steps) else "local"
    return builder.done(
        route, tuple(buffer.name for buffer in inputs), tuple(buffer.name for buffer in outputs)
    )


class Nearness:
    """How far ranks are from each other: the price of one message."""

    def __init__(self, prices: Prices) -> None:
        self.prices = prices
        self._known: dict[tuple[int, int], float] = {}

    def __call__(self, holder: int, to: int) -> float:
        pair = (holder, to)
        if pair not in self._known:
            self._known[pair] = self.prices.messages([(holder, to, _PROBE_BYTES)])
        return self._known[pair]


def deliver(
    builder: Builder,
    held: dict[str, Buffer],
    wants: Sequence[tuple[int, Mask, Sequence[Transfer]]],
    prices: Prices,
) -> list[Buffer]:
    """Add the steps that give each rank its wanted mask: slice, send, put together.

    `held` are the buffers that the transfers' holdings name. Each box goes to a rank once.
    """
    item_bytes = builder.tensor.item_bytes
    cut: dict[tuple[str, Mask], Buffer] = {}
    arrived: dict[tuple[str, Mask, int], Buffer] = {}
    away = [
        (transfer, held[transfer.holding.name])
        for _, _, found in wants
        for transfer in found
        if held[transfer.holding.name].rank != transfer.to and transfer.holding.rank != transfer.to
    ]
    for transfer, source in away:
        key = (source.name, transfer.mask)
        if key not in cut:
            cut[key] = builder.local(source.rank, transfer.mask, (source,))
    builder.end_phase()
    messages = []
    for transfer, source in away:
        target = (source.name, transfer.mask, transfer.to)
        if target not in arrived:
            arrived[target] = builder.buffer(transfer.to, transfer.mask)
            message = (source.rank, transfer.to, transfer.mask.numel * item_bytes)
            messages.append(message)
            builder.step(
                "send",
                message[:2],
                (cut[source.name, transfer.mask],),
                (arrived[target],),
                num_bytes=message[2],
                seconds=prices.messages([message]),
            )
    builder.end_phase(prices.messages(messages))
    received: dict[tuple[str, int], list[Buffer]] = {}
    for (name, _, to), buffer in arrived.items():
        received.setdefault((name, to), []).append(buffer)
    made = []
    for rank, mask, found in wants:
        parts = [_part(builder, held, received, rank, transfer) for transfer in found]
        made.append(builder.local(rank, mask, tuple(parts)))
    builder.end_phase()
    return made


def _part(
    builder: Builder,
    held: dict[str, Buffer],
    received: dict[tuple[str, int], list[Buffer]],
    rank: int,
    transfer: Transfer,
) -> Buffer:
    """What a transfer delivered on its rank, cut to its box if it came as part of a larger one."""
    source = held[transfer.holding.name]
    if source.rank == rank:
        return builder.local(rank, transfer.mask, (source,))
    for buffer in received[source.name, rank]:
        if transfer.mask in buffer.mask:
            return builder.local(rank, transfer.mask, (buffer,))
    raise AssertionError(f"{transfer} never arrived")
