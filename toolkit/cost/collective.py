"""Seconds and bytes of a collective over given ranks: alpha-beta per algorithm on the topology.

Notation: n ranks on m machines, g on each; B bytes of the full tensor; alpha, beta^-1 = latency and
bandwidth of a step. Inside a machine a device's bandwidth comes from the wiring (Node.among);
across machines the ports are shared by whoever uses them at once. Sources: Thakur, Rabenseifner and
Gropp, "Optimization of Collective Communication Operations in MPICH" (2005); Sanders, Speck and
Traeff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan" (2009).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from toolkit.cost.span import Span, span
from toolkit.errors import UsageError, unknown_name
from toolkit.hardware.cluster import Cluster

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class CollectiveCost:
    """What a collective takes. `bytes_by_link` sums what all ranks send over each kind of link."""

    kind: Kind
    num_bytes: float
    num_ranks: int
    seconds: float
    algorithm: str
    bytes_sent_per_rank: float  # by the rank that sends most
    bytes_by_link: Mapping[str, float] = field(default_factory=dict, hash=False)


# An algorithm returns (seconds, bytes the busiest rank sends, bytes all send inside and across
# machines), or None where it does not apply.
_Result = tuple[float, float, float, float] | None
_Algorithm = Callable[[Span, float], _Result]


def _ring_traffic(span_: Span, edge_bytes: float) -> tuple[float, float]:
    """A ring has n edges; with several machines one leaves each."""
    across = span_.num_nodes if span_.num_nodes > 1 else 0
    return edge_bytes * (span_.num_ranks - across), edge_bytes * across


def _ring(passes: int) -> _Algorithm:
    """All-gather and reduce-scatter pass the ring once, all-reduce twice: `passes`(n-1) steps."""

    def cost(span_: Span, num_bytes: float) -> _Result:
        n = span_.num_ranks
        sent = passes * (n - 1) / n * num_bytes
        seconds = passes * (n - 1) * span_.latency + sent / span_.ring_bandwidth
        return (seconds, sent, *_ring_traffic(span_, sent))

    return cost


def _log(count: int) -> int:
    return math.ceil(math.log2(count)) if count > 1 else 0


def _steps_latency(span_: Span) -> float:
    """Latency of a recursive algorithm that finishes inside the machines first."""
    if span_.num_nodes == 1:
        return _log(span_.num_ranks) * span_.latency_in
    if not span_.uniform:
        return _log(span_.num_ranks) * span_.latency
    return _log(span_.per_node) * span_.latency_in + _log(span_.num_nodes) * span_.latency_out


def _halving(passes: int) -> _Algorithm:
    """Recursive halving or doubling (Bruck's where n is no power of two), large parts inside."""

    def cost(span_: Span, num_bytes: float) -> _Result:
        n, m, g = span_.num_ranks, span_.num_nodes, span_.per_node
        if m > 1 and not span_.uniform:
            return None
        inside = passes * (g - 1) / g * num_bytes
        across = passes * (m - 1) / m * num_bytes / g
        seconds = passes * _steps_latency(span_) + inside / span_.bandwidth_in
        seconds += across / span_.bandwidth_out
        return seconds, inside + across, inside * n, across * n

    return cost


def _recursive_doubling(span_: Span, num_bytes: float) -> _Result:
    """All-reduce that exchanges everything in each of log2 n steps: for short messages."""
    n, m, g = span_.num_ranks, span_.num_nodes, span_.per_node
    if n & (n - 1) or (m > 1 and (not span_.uniform or m & (m - 1))):
        return None
    inside, across = _log(g) * num_bytes, _log(m) * num_bytes
    seconds = _steps_latency(span_) + inside / span_.bandwidth_in + across / span_.bandwidth_out
    return seconds, inside + across, inside * n, across * n


def _two_trees(span_: Span, num_bytes: float) -> _Result:
    """All-reduce over two complementary pipelined trees, half of the data each."""
    n, m = span_.num_ranks, span_.num_nodes
    across = 2 * (m - 1) * num_bytes
    inside = 2 * (n - 1) * num_bytes - across
    seconds = 2 * _steps_latency(span_) + 2 * num_bytes / span_.ring_bandwidth
    return seconds, 2 * num_bytes, inside, across


def _binomial(span_: Span, num_bytes: float) -> _Result:
    """Broadcast down a binomial tree: between machines first, then inside."""
    n, m, g = span_.num_ranks, span_.num_nodes, span_.per_node
    seconds = _steps_latency(span_)
    if m == 1:
        seconds += _log(n) * num_bytes / span_.bandwidth_in
    elif span_.uniform:
        seconds += _log(m) * num_bytes / span_.bandwidth_out
        seconds += _log(g) * num_bytes / span_.bandwidth_in if g > 1 else 0.0
    else:
        slow = min(span_.bandwidth_in, span_.bandwidth_out)
        seconds += _log(n) * num_bytes / slow
    return seconds, _log(n) * num_bytes, (n - m) * num_bytes, (m - 1) * num_bytes


def _chain(span_: Span, num_bytes: float) -> _Result:
    """Broadcast down a pipelined chain, in the number of pieces that is fastest.

    With k pieces T = (n - 2 + k)(alpha + B/(k beta)); at the best k it is
    (sqrt((n-2) alpha) + sqrt(B/beta))^2, and k is at least one.
    """
    n, m = span_.num_ranks, span_.num_nodes
    alpha, transfer = span_.latency, num_bytes / span_.ring_bandwidth
    pieces = math.sqrt((n - 2) * transfer / alpha) if alpha else math.inf
    if pieces <= 1:
        seconds = (n - 1) * (alpha + transfer)
    else:
        seconds = (math.sqrt((n - 2) * alpha) + math.sqrt(transfer)) ** 2
    return seconds, num_bytes, (n - m) * num_bytes, (m - 1) * num_bytes


def _pairwise(span_: Span, num_bytes: float) -> _Result:
    """All-to-all in n-1 exchanges; the wires inside and the ports between work side by side."""
    n, g = span_.num_ranks, span_.per_node
    piece = num_bytes / n / n
    inside, across = (g - 1) * piece, (n - g) * piece
    latency = (g - 1) * span_.latency_in + (n - g) * span_.latency_out
    if not span_.uniform:  # a rank on the emptiest machine sends most of its data away
        across, latency = (n - 1) * piece, (n - 1) * span_.latency
    seconds = latency + max(inside / span_.bandwidth_in, across / span_.bandwidth_out)
    return seconds, (n - 1) * piece, inside * n, ((n - 1) * piece - inside) * n


def _bruck(span_: Span, num_bytes: float) -> _Result:
    """All-to-all in log2 n steps that each forward half of the data: for short messages."""
    n, m, g = span_.num_ranks, span_.num_nodes, span_.per_node
    if n & (n - 1) or not span_.uniform:
        return None
    half = num_bytes / n / 2
    inside, across = _log(g) * half, _log(m) * half
    seconds = _steps_latency(span_) + inside / span_.bandwidth_in + across / span_.bandwidth_out
    return seconds, inside + across, inside * n, across * n


def _direct(span_: Span, num_bytes: float) -> _Result:
    """One message."""
    if span_.num_nodes == 1:
        return span_.latency_in + num_bytes / span_.bandwidth_in, num_bytes, num_bytes, 0.0
    return span_.latency_out + num_bytes / span_.bandwidth_out, num_bytes, 0.0, num_bytes


def _cheapest(kind: Kind, span_: Span, num_bytes: float) -> tuple[float, float]:
    """(seconds, bytes per rank) of the cheapest flat algorithm; nothing to do for one rank."""
    if span_.num_ranks == 1:
        return 0.0, 0.0
    results = (make(span_, num_bytes) for make in _FLAT[kind].values())
    return min((result[0], result[1]) for result in results if result)


def _hierarchical(phases: tuple[tuple[Kind, str], ...]) -> _Algorithm:
    """Two levels: across machines each rank deals only with its 1/g of the data."""

    def cost(span_: Span, num_bytes: float) -> _Result:
        if span_.num_nodes == 1 or span_.per_node == 1 or not span_.uniform:
            return None
        seconds = inside = across = 0.0
        for phase, where in phases:
            if where == "in":
                spent, sent = _cheapest(phase, span_.inner, num_bytes)
                inside += sent
            else:
                spent, sent = _cheapest(phase, span_.outer, num_bytes / span_.per_node)
                across += sent
            seconds += spent
        return seconds, inside + across, inside * span_.num_ranks, across * span_.num_ranks

    return cost


def _hierarchical_broadcast(span_: Span, num_bytes: float) -> _Result:
    """Scatter inside the root's machine, broadcast each part across, gather inside every one."""
    m, g = span_.num_nodes, span_.per_node
    if m == 1 or g == 1 or not span_.uniform:
        return None
    # A scatter down a binomial tree costs what recursive halving does.
    scatter_s, scattered = _cheapest("reduce_scatter", span_.inner, num_bytes)
    outer_s, sent = _cheapest("broadcast", span_.outer, num_bytes / g)
    gather_s, gathered = _cheapest("all_gather", span_.inner, num_bytes)
    inside = scattered + gathered * g * m
    seconds = scatter_s + outer_s + gather_s
    return seconds, scattered + sent + gathered, inside, (m - 1) * num_bytes


def _hierarchical_all_to_all(span_: Span, num_bytes: float) -> _Result:
    """Sort by destination machine inside, then exchange across with one rank per machine."""
    n, m, g = span_.num_ranks, span_.num_nodes, span_.per_node
    if m == 1 or g == 1 or not span_.uniform:
        return None
    held = num_bytes / n
    inside, across = (g - 1) / g * held, (m - 1) / m * held
    seconds = (g - 1) * span_.latency_in + inside / span_.bandwidth_in
    seconds += (m - 1) * span_.latency_out + across / span_.bandwidth_out
    return seconds, inside + across, inside * n, across * n


_FLAT: dict[Kind, dict[str, _Algorithm]] = {
    "all_reduce": {
        "ring": _ring(2),
        "halving_doubling": _halving(2),
        "recursive_doubling": _recursive_doubling,
        "tree": _two_trees,
    },
    "all_gather": {"ring": _ring(1), "recursive_doubling": _halving(1)},
    "reduce_scatter": {"ring": _ring(1), "recursive_halving": _halving(1)},
    "all_to_all": {"pairwise": _pairwise, "bruck": _bruck},
    "broadcast": {"tree": _binomial, "chain": _chain},
    "send": {"direct": _direct},
}
_TWO_LEVEL: dict[Kind, _Algorithm] = {
    "all_reduce": _hierarchical(
        (("reduce_scatter", "in"), ("all_reduce", "out"), ("all_gather", "in"))
    ),
    "reduce_scatter": _hierarchical((("reduce_scatter", "in"), ("reduce_scatter", "out"))),
    "all_gather": _hierarchical((("all_gather", "out"), ("all_gather", "in"))),
    "all_to_all": _hierarchical_all_to_all,
    "broadcast": _hierarchical_broadcast,
}
_ALGORITHMS: dict[Kind, dict[str, _Algorithm]] = {
    kind: {**flat, "hierarchical": _TWO_LEVEL[kind]} if kind in _TWO_LEVEL else flat
    for kind, flat in _FLAT.items()
}


def algorithms(kind: str) -> tuple[str, ...]:
    """Return the algorithms modelled for a kind of collective."""
    return (*_ALGORITHMS[_kind(kind)], "measured")


def _kind(name: str) -> Kind:
    for kind in KINDS:
        if kind == name:
            return kind
    raise unknown_name("collective", name, KINDS)


def siblings(ranks: Sequence[int], cluster: Cluster) -> int:
    """Return how many groups like `ranks` fit on their machines at once.

    That is what `concurrent` should be when every device takes part in such a group, as along an
    axis of a device mesh.
    """
    machines = cluster.by_node(ranks).values()
    return max(1, min(places[0].node.num_devices // len(places) for places in machines))


def cost(
    kind: str,
    num_bytes: float,
    ranks: Sequence[int],
    cluster: Cluster,
    *,
    algorithm: str = "auto",
    concurrent: int = 1,
) -> CollectiveCost:
    """Predict a collective over `ranks` of a cluster.

    `num_bytes` is the size of the full tensor: what every rank holds after all_gather, before
    reduce_scatter, and on both sides of all_reduce and broadcast; all_to_all holds 1/n of it on
    each rank. `concurrent` is how many such groups run at once on the same machines and share
    their ports (see `siblings`). "auto" takes the cheapest algorithm and says which; where this
    machine was probed for the kind and number of ranks, that measured line ("measured") is used.
    Raises UsageError for an unknown kind, algorithm or rank, or an algorithm that does not apply.
    """
    which = _kind(kind)
    members = tuple(ranks)
    if len(set(members)) != len(members) or not members:
        raise UsageError(f"a collective needs distinct ranks, not {list(members)[:8]}")
    if num_bytes < 0 or concurrent < 1:
        raise UsageError(
            f"a collective needs num_bytes >= 0 and concurrent >= 1, not {num_bytes}, {concurrent}"
        )
    if which == "send" and len(members) != 2:
        raise UsageError(f"send takes two ranks, the sender and the receiver, not {len(members)}")
    if algorithm not in ("auto", *algorithms(which)):
        raise unknown_name(f"{which} algorithm", algorithm, ("auto", *algorithms(which)))
    if len(members) == 1:
        cluster.place(members[0])
        return CollectiveCost(which, num_bytes, 1, 0.0, "none", 0.0)
    span_ = span(members, cluster, concurrent)
    found: list[tuple[str, tuple[float, float, float, float]]] = []
    for name, make in _ALGORITHMS[which].items():
        if algorithm in ("auto", "measured", name):
            result = make(span_, num_bytes)
            if result:
                found.append((name, result))
    if not found:
        raise UsageError(
            f"{algorithm} {which} does not apply to {span_.num_ranks} ranks on {span_.num_nodes} "
            f"machines",
            remedy='use algorithm="auto"',
        )
    name, (seconds, sent, inside, across) = min(found, key=lambda item: item[1][0])
    if algorithm in ("auto", "measured"):
        alone = span_.num_nodes == 1 and concurrent == 1
        measured = _measured(which, num_bytes, members, cluster) if alone else None
        if measured is not None:
            name, seconds = "measured", measured
        elif algorithm == "measured":
            raise UsageError(
                f"{which} was not measured for {len(members)} ranks of {cluster.name}",
                remedy="probe the machine, or name another algorithm",
            )
    traffic: dict[str, float] = {}
    for link, total in ((span_.link_in, inside), (span_.link_out, across)):
        if total:  # the same kind of link may serve both
            traffic[link] = traffic.get(link, 0.0) + total
    return CollectiveCost(which, num_bytes, len(members), seconds, name, sent, traffic)


def _measured(
    kind: Kind, num_bytes: float, ranks: tuple[int, ...], cluster: Cluster
) -> float | None:
    """Seconds by the line measured on the ranks' one machine, where there is one."""
    for fit in cluster.place(ranks[0]).node.measured:
        if fit.kind == kind and fit.num_ranks == len(ranks):
            return fit.seconds(num_bytes)
    return None
