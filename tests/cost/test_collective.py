"""Collectives: closed forms, identities, monotonicity, and who crosses which link."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.cost import collective
from toolkit.cost.span import span
from toolkit.errors import UsageError
from toolkit.hardware import Cluster, Link, Node, find_cluster, find_device
from toolkit.hardware.cluster import Group, Level
from toolkit.hardware.node import CollectiveFit

WIRE = Link("wire", 100e9, 2e-6)
PORT = Link("port", 10e9, 20e-6)


def box(num_devices: int, count: int = 1, num_nics: int = 1, **settings) -> Cluster:
    node = Node(
        "box", find_device("h100"), num_devices, "switch", WIRE, nic=PORT, num_nics=num_nics
    )
    return Cluster("boxes", (Group(node, count),), **settings)


sizes = st.floats(0, 1e12)
clusters = st.sampled_from(
    ["h100x8", "dgx1", "mi300x8", "generic-cpux4", "4xh100x8", "3xh100x4", "5xl4", "2xdgx1",
     "16xdgx2", "dgx2+h100x4", "2xh100x8+3xa100x3"]
)  # fmt: skip


@pytest.mark.parametrize("n", [2, 3, 4, 8])
@pytest.mark.parametrize("num_bytes", [0, 1e3, 1e9])
def test_ring_closed_forms(n, num_bytes):
    cluster, alpha, beta = box(n), WIRE.latency_s, WIRE.bandwidth

    def ring(kind):
        return collective.cost(kind, num_bytes, cluster.ranks, cluster, algorithm="ring").seconds

    part = (n - 1) / n * num_bytes / beta
    assert ring("all_reduce") == pytest.approx(2 * part + 2 * (n - 1) * alpha)
    assert ring("all_gather") == pytest.approx(part + (n - 1) * alpha)
    assert ring("reduce_scatter") == pytest.approx(part + (n - 1) * alpha)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_other_closed_forms(n):
    cluster, alpha, beta, size = box(n), WIRE.latency_s, WIRE.bandwidth, 1e8

    def seconds(kind, algorithm):
        return collective.cost(kind, size, cluster.ranks, cluster, algorithm=algorithm).seconds

    log = math.log2(n)
    assert seconds("all_reduce", "recursive_doubling") == pytest.approx(log * (alpha + size / beta))
    assert seconds("all_reduce", "halving_doubling") == pytest.approx(
        2 * log * alpha + 2 * (n - 1) / n * size / beta
    )
    assert seconds("all_reduce", "tree") == pytest.approx(2 * log * alpha + 2 * size / beta)
    assert seconds("all_to_all", "pairwise") == pytest.approx(
        (n - 1) * (alpha + size / n / n / beta)
    )
    assert seconds("broadcast", "tree") == pytest.approx(log * (alpha + size / beta))
    chain = (math.sqrt((n - 2) * alpha) + math.sqrt(size / beta)) ** 2
    if n > 2:  # two ranks have nothing to pipeline
        assert seconds("broadcast", "chain") == pytest.approx(chain)
    pair = collective.cost("send", size, (0, 1), cluster)
    assert pair.seconds == pytest.approx(alpha + size / beta)


def test_chain_never_uses_less_than_one_piece():
    cluster = box(8)
    tiny = collective.cost("broadcast", 8, cluster.ranks, cluster, algorithm="chain").seconds
    assert tiny == pytest.approx(7 * (WIRE.latency_s + 8 / WIRE.bandwidth))


@given(clusters, sizes)
def test_all_reduce_costs_at_most_reduce_scatter_and_all_gather(name, num_bytes):
    cluster = find_cluster(name)
    cost = {
        kind: collective.cost(kind, num_bytes, cluster.ranks, cluster).seconds
        for kind in ("all_reduce", "reduce_scatter", "all_gather")
    }
    assert cost["reduce_scatter"] == pytest.approx(cost["all_gather"])
    assert cost["all_reduce"] <= (cost["reduce_scatter"] + cost["all_gather"]) * (1 + 1e-9)


@given(clusters, st.sampled_from(collective.KINDS), sizes, sizes)
def test_more_bytes_never_take_less_time(name, kind, one, other):
    cluster = find_cluster(name)
    ranks = (0, cluster.num_devices - 1) if kind == "send" else cluster.ranks
    low, high = (
        collective.cost(kind, size, ranks, cluster).seconds for size in sorted((one, other))
    )
    assert low <= high


@given(clusters, st.sampled_from(collective.KINDS), sizes)
def test_auto_is_the_cheapest_and_says_which(name, kind, num_bytes):
    cluster = find_cluster(name)
    ranks = (0, 1) if kind == "send" else cluster.ranks
    chosen = collective.cost(kind, num_bytes, ranks, cluster)
    for algorithm in collective.algorithms(kind):
        try:
            named = collective.cost(kind, num_bytes, ranks, cluster, algorithm=algorithm)
        except UsageError:
            continue
        assert chosen.seconds <= named.seconds
        if algorithm == chosen.algorithm:
            assert named == chosen


@given(clusters, st.sampled_from(["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]))
def test_traffic_adds_up(name, kind):
    """In a symmetric algorithm what all ranks send is n times what one sends."""
    cluster = find_cluster(name)
    for algorithm in (*collective.algorithms(kind), "auto"):
        try:
            cost = collective.cost(kind, 1e8, cluster.ranks, cluster, algorithm=algorithm)
        except UsageError:
            continue
        if algorithm == "tree" or cost.algorithm == "tree":
            continue  # the roots of the two trees send less
        total = sum(cost.bytes_by_link.values())
        assert total == pytest.approx(cost.bytes_sent_per_rank * cluster.num_devices)
        if kind == "all_reduce":  # no algorithm can do with less
            n = cluster.num_devices
            assert cost.bytes_sent_per_rank >= 2 * (n - 1) / n * 1e8 * (1 - 1e-9)


def test_two_levels_beat_a_flat_ring_over_slow_links():
    cluster = box(8, 4)
    for kind in ("all_reduce", "all_gather", "reduce_scatter"):
        for num_bytes in (1e4, 1e7, 1e10):
            flat, two = (
                collective.cost(kind, num_bytes, cluster.ranks, cluster, algorithm=algorithm)
                for algorithm in ("ring", "hierarchical")
            )
            assert two.seconds < flat.seconds
            if num_bytes > 1e6:  # short messages trade bytes for steps
                assert two.bytes_by_link["port"] < flat.bytes_by_link["port"]


def test_hierarchical_all_reduce_closed_form():
    m, g, size = 4, 8, 1e10
    cluster = box(g, m)
    port = PORT.bandwidth / g  # one port for eight devices
    inside = 2 * (g - 1) / g * size / WIRE.bandwidth
    across = 2 * (m - 1) / m * size / g / port
    latency = 2 * 3 * WIRE.latency_s + 2 * 2 * PORT.latency_s  # log2 8, log2 4 steps, twice
    cost = collective.cost("all_reduce", size, cluster.ranks, cluster, algorithm="hierarchical")
    assert cost.seconds == pytest.approx(inside + across + latency)


def test_ports_are_shared_by_those_who_use_them_at_once():
    cluster = box(8, 2)
    pair = (0, 8)
    assert collective.siblings(pair, cluster) == 8
    alone = collective.cost("all_reduce", 1e9, pair, cluster)
    crowd = collective.cost("all_reduce", 1e9, pair, cluster, concurrent=8)
    assert crowd.seconds == pytest.approx(8 * alone.seconds, rel=0.01)
    # With a port for every device nothing is shared.
    rich = box(8, 2, num_nics=8)
    alone = collective.cost("all_reduce", 1e9, pair, rich)
    assert collective.cost("all_reduce", 1e9, pair, rich, concurrent=8).seconds == alone.seconds


def test_a_shared_medium_is_divided():
    two, four = find_cluster("generic-cpux2"), find_cluster("generic-cpux4")
    assert span(tuple(two.ranks), two).bandwidth_in == 2 * (
        span(tuple(four.ranks), four).bandwidth_in
    )


def test_oversubscription_slows_only_what_crosses_it():
    levels = (Level("leaf", 2), Level("spine", None, 1e-6, 4.0))
    cluster = box(1, 4, network=levels)
    near = collective.cost("send", 1e9, (0, 1), cluster)
    far = collective.cost("send", 1e9, (0, 2), cluster)
    assert far.seconds == pytest.approx(4 * near.seconds, rel=0.01)


def test_the_slowest_machine_decides():
    mixed = find_cluster("h100x8+l4x8")
    fast = find_cluster("2xh100x8")
    size = 1e9
    assert (
        collective.cost("all_reduce", size, mixed.ranks, mixed).seconds
        > collective.cost("all_reduce", size, fast.ranks, fast).seconds
    )


def test_a_measured_line_is_used_where_it_applies():
    fit = CollectiveFit("all_reduce", 2, 1e-3, 1e9, 1, 10**6, 0.0, 0.0)
    node = Node("cpu", find_device("generic-cpu"), 4, "shared", WIRE, measured=(fit,))
    cluster = Cluster("c", (Group(node),))
    cost = collective.cost("all_reduce", 1e9, (0, 1), cluster)
    assert (cost.algorithm, cost.seconds) == ("measured", pytest.approx(1.001))
    assert collective.cost("all_reduce", 1e9, (0, 1, 2), cluster).algorithm != "measured"
    assert collective.cost("all_reduce", 1e9, (0, 1), cluster, concurrent=2).algorithm != "measured"
    with pytest.raises(UsageError, match="was not measured for 3 ranks"):
        collective.cost("all_reduce", 1e9, (0, 1, 2), cluster, algorithm="measured")


def test_one_rank_needs_nobody():
    cost = collective.cost("all_reduce", 1e9, (3,), find_cluster("h100x8"))
    assert (cost.seconds, cost.bytes_sent_per_rank, cost.algorithm) == (0, 0, "none")


@pytest.mark.parametrize(
    ("kind", "ranks", "settings", "says"),
    [
        ("allreduce", (0, 1), {}, "did you mean 'all_reduce'"),
        ("all_reduce", (0, 0), {}, "distinct ranks"),
        ("all_reduce", (), {}, "distinct ranks"),
        ("all_reduce", (0, 99), {}, "its ranks are 0 to 7"),
        ("all_reduce", (0, 1), {"algorithm": "rink"}, "did you mean 'ring'"),
        ("all_reduce", (0, 1), {"algorithm": "hierarchical"}, "does not apply to 2 ranks on 1"),
        ("all_reduce", (0, 1), {"concurrent": 0}, "concurrent >= 1"),
        ("send", (0, 1, 2), {}, "send takes two ranks"),
    ],
)
def test_errors(kind, ranks, settings, says):
    with pytest.raises(UsageError, match=says):
        collective.cost(kind, 1e6, ranks, find_cluster("h100x8"), **settings)
