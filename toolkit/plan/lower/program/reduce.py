"""The end of a step: gradients of weights summed over all who share them.

Weights of a unit that the same ranks share are reduced as one flat buffer, replicas of the batch
included. A weight whose shares lie otherwise is first brought together by an exchange of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from toolkit.plan.lower.program.exchange import Exchange
from toolkit.plan.lower.program.walk import Event, Walk
from toolkit.plan.plan import Plan


@dataclass(frozen=True)
class Reduction:
    """One all-reduce: of the gradients of `weights` (graph names), as one buffer, over `ranks`
    (of the whole mesh, as the first replica's rank sees it).
    """

    unit: str
    weights: tuple[str, ...]
    dtype: str
    ranks: tuple[int, ...]
    num_bytes: int


def copies(plan: Plan, rank: int) -> tuple[int, ...]:
    """Return the ranks that run the same as a rank of the first replica, itself included."""
    apart, near = plan.stride("replica"), plan.stride("data")
    return tuple(
        rank + replica * apart + data * near
        for replica in range(plan.size("replica"))
        for data in range(plan.size("data"))
    )


def events(walk: Walk, rank: int) -> Iterator[Event]:
    """Yield everything a rank does between ranks in one step, in order, but for reductions."""
    yield from walk.events(rank)
    for name in walk.held:
        yield from own_events(walk, name, rank)


def groups(walk: Walk) -> set[tuple[int, ...]]:
    """Return the groups of ranks (of the whole mesh) that run a collective."""
    shifts = copies(walk.plan, 0)
    found: set[tuple[int, ...]] = set()
    for rank in walk.written.replica:
        found.update(one.ranks for one in reductions(walk, rank))
        for event in events(walk, rank):
            if event.task.what == "collective":
                ranks = event.task.step.ranks
                found.update(tuple(one + shift for one in ranks) for shift in shifts)
    return found


def own_events(walk: Walk, name: str, rank: int) -> tuple[Event, ...]:
    """Return what a rank does for the gradient of one weight alone, before any reduction."""
    events = tuple(walk.weight_events(name, rank))
    if is_plain(walk.weights[name]):
        return tuple(event for event in events if event.task.what == "local")
    return events


def is_plain(exchange: Exchange) -> bool:
    """Whether all a gradient needs, once a rank's own shares are summed, is one all-reduce."""
    adapter = exchange.backward
    if adapter is None or not adapter.communication:
        return False
    last: dict[int, str] = {}
    for step in adapter.steps:
        if step.kind == "all_reduce":
            if any(rank in last for rank in step.ranks):
                return False
            last.update(zip(step.ranks, step.writes, strict=True))
        elif step in adapter.communication or any(rank in last for rank in step.ranks):
            return False
    return all(
        last.get(rank, output) == output
        for (rank, _), output in zip(exchange.made, adapter.outputs, strict=True)
    )


def sharers(walk: Walk, name: str, rank: int) -> tuple[int, ...]:
    """Return over which ranks of the replica a plain gradient is all-reduced: those that share."""
    exchange = walk.weights[name]
    if is_plain(exchange):
        assert exchange.backward is not None
        for step in exchange.backward.communication:
            if rank in step.ranks:
                return tuple(sorted(step.ranks))
    return (rank,)


def reductions(walk: Walk, rank: int) -> tuple[Reduction, ...]:
    """Return the all-reduces a rank of the first replica takes part in, in order.

    The order is that of units, innermost first, and within a unit of weights: so it is the same on
    all ranks.
    """
    plan, graph = walk.plan, walk.graph
    found: list[Reduction] = []
    for unit, names in units(walk):
        alike: dict[tuple[tuple[int, ...], str], list[str]] = {}
        for name in names:
            if rank in walk.held[name] and walk.weights[name].backward is not None:
                near = [one for own in sharers(walk, name, rank) for one in copies(plan, own)]
                alike.setdefault((tuple(sorted(near)), graph.tensors[name].dtype), []).append(name)
        for (ranks, dtype), several in sorted(alike.items()):
            if len(ranks) > 1:
                size = sum(
                    walk.held[name][rank].numel * graph.tensors[name].num_bytes
                    // graph.tensors[name].numel
                    for name in several
                )  # fmt: skip
                found.append(Reduction(unit, tuple(several), dtype, ranks, size))
    return tuple(found)


def units(walk: Walk) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (unit, its weights): the plan's units of the data axis, innermost first, and the root
    for what is in none.
    """
    left = {tensor.name: tensor.fqn or tensor.name for tensor in walk.graph.parameters()}
    paths = {*walk.plan.placed("replicate"), ""}
    for unit in sorted(paths, key=lambda path: (-path.count(".") - bool(path), path)):
        names = tuple(
            name for name, path in left.items() if not unit or path.startswith(f"{unit}.")
        )
        for name in names:
            del left[name]
        yield unit, names
