"""RVD: layouts, moves, and paths that are cheapest and end where they should."""

from __future__ import annotations

import itertools
import math
import random

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import UsageError
from toolkit.hardware import find_cluster
from toolkit.plan.rvd import between, layouts, search
from toolkit.plan.rvd.layouts import D, Layout, Placed
from toolkit.plan.rvd.moves import kind
from toolkit.plan.rvd.prices import AlphaBeta, Volume

CLUSTERS = ("h100x8", "dgx1", "mi300x8", "generic-cpux8", "2xh100x4", "4xh100x2", "2xh100x3+2xl4")


def placed(rng, axes, num_dims, *, values=True):
    """A random layout on the grid `axes`."""
    slots = [[] for _ in range(D + num_dims)]
    for axis in rng.sample(range(len(axes)), len(axes)):
        places = [place for place in range(D + num_dims) if values or place != 1]
        slots[rng.choice(places)].append(axis)
    return Placed(axes, tuple(map(tuple, slots)))


def repriced(path, prices, shape, item_bytes):
    price = search.Pricer(prices, path.ranks, path.axes, shape, item_bytes)
    return sum(price.of(move) for move in path.moves)


@pytest.mark.parametrize(("shape", "num_ranks"), [((4, 6), 12), ((8,), 8), ((3, 5, 2), 6), ((), 4)])
def test_every_layout_is_every_factorisation_that_divides_the_shape(shape, num_ranks):
    found = layouts.every(shape, num_ranks)
    counts = itertools.product(range(1, num_ranks + 1), repeat=2 + len(shape))
    expected = {
        Layout(r, v, tuple(dims))
        for r, v, *dims in counts
        if r * v * math.prod(dims) == num_ranks
        and all(size % dim == 0 for size, dim in zip(shape, dims, strict=True))
    }
    assert len(found) == len(set(found))
    assert set(found) == expected


@given(st.randoms(use_true_random=False), st.sampled_from([(2, 2, 3), (4, 2), (2, 3), (6,), ()]))
def test_a_layout_is_recognised_from_what_the_ranks_hold(rng, axes):
    shape = (24, 48)
    layout = placed(rng, axes, 2)
    masks = layout.masks(shape)
    found = layouts.recognise(shape, masks, axes)
    assert found == layout
    # ... whichever way its partial sums are numbered, on ranks in any order
    ranks = rng.sample(range(100), len(masks))
    aligned = layouts.align(
        shape, dict(zip(ranks, masks, strict=True)), dict(zip(ranks, masks, strict=True))
    )
    assert aligned is not None
    order, one, _ = aligned
    assert one.layout == layout.layout
    assert dict(zip(order, (m.box for m in one.masks(shape)), strict=True)) == dict(
        zip(ranks, (m.box for m in masks), strict=True)
    )


def test_what_is_not_regular_is_not_recognised():
    shape = (8, 8)
    whole = layouts.Mask.whole(shape)
    uneven = [whole.split(0, 0, 2), whole.split(0, 1, 2).split(0, 0, 2)]
    crossed = [whole.split(0, 0, 2), whole.split(1, 0, 2)]
    incomplete = [whole.share(0, 2), whole.share(0, 2).share(0, 2)]
    for masks in (uneven, crossed, incomplete, [whole.split(0, 0, 2)] * 2, [whole.share(1, 2)] * 2):
        assert layouts.recognise(shape, masks, (2,)) is None


@given(st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_moves_change_one_count_each_way_and_can_be_undone(rng):
    shape = (8, 8, 16)
    axes = rng.choice([(2, 2), (2, 4), (2, 2, 2)])
    layout = placed(rng, axes, 3)
    state = layout.slots
    space = search.room(shape, layout, Placed(axes, ((), tuple(range(len(axes))), (), (), ())))
    for step in space.neighbours(state):
        before, after = Placed(axes, state), Placed(axes, step.other)
        after.check(shape)
        old, new = ([x.replicas, x.values, *x.dims] for x in (before.layout, after.layout))
        if kind(step.source, step.target) == "permute":
            assert old == new
        else:
            grown = math.prod(axes[axis] for axis in step.order)
            assert (new[step.target], old[step.source]) == (
                old[step.target] * grown, new[step.source] * grown,
            )  # fmt: skip
        back = {neighbour.other for neighbour in space.neighbours(step.other)}
        assert state in back


@given(st.randoms(use_true_random=False), st.sampled_from(CLUSTERS))
@settings(max_examples=30, deadline=None)
def test_the_path_found_is_the_shortest_in_the_whole_graph(rng, name):
    prices = AlphaBeta(find_cluster(name))
    axes = rng.choice([(2, 2), (4,), (2, 2, 2), (2, 4)])
    ranks = tuple(rng.sample(range(8), math.prod(axes)))
    shape = (16, rng.choice([2, 16 << rng.randrange(16)]))
    source, target = placed(rng, axes, 2), placed(rng, axes, 2)
    try:
        path = search.find(shape, 4, ranks, source, target, prices)
    except UsageError:
        assert shape[1] == 2
        return
    space = search.room(shape, source, target)
    price = search.Pricer(prices, ranks, axes, shape, 4)
    graph = nx.DiGraph()
    queue = [source.slots]
    while queue:
        state = queue.pop()
        if graph.nodes.get(state, {}).get("done"):
            continue
        graph.add_node(state, done=True)
        for step in space.neighbours(state):
            graph.add_edge(state, step.other, weight=price.of(space.move(state, step)))
            queue.append(step.other)
    shortest = nx.shortest_path_length(graph, source.slots, target.slots, weight="weight")
    if [move.kind for move in path.moves] == ["all_reduce"]:  # taken unless it is clearly worse
        assert shortest * (1 - 1e-9) <= path.cost <= 1.25 * shortest
    else:
        assert path.cost == pytest.approx(shortest)
    states = [source.slots, *(move.after for move in path.moves)]
    assert states[-1] == target.slots
    for move, before in zip(path.moves, states, strict=False):
        assert move.before == before
        place = D + (move.dim or 0)
        if move.kind in ("slice", "reduce_scatter"):  # further inside ...
            assert move.after[place] == (*move.before[place], *move.axes)
        elif move.kind in ("all_gather", "pad", "all_to_all"):  # ... and from the inside out
            assert move.before[place] == (*move.after[place], *move.axes)


@given(st.randoms(use_true_random=False), st.sampled_from(CLUSTERS))
@settings(max_examples=80, deadline=None)
def test_a_path_never_costs_more_than_the_one_the_volume_would_choose(rng, name):
    cluster = find_cluster(name)
    prices = AlphaBeta(cluster)
    axes = rng.choice([(2, 2), (4,), (2, 2, 2), (2, 4), (2, 3)])
    ranks = tuple(rng.sample(range(8), math.prod(axes)))
    shape = (24, 24 << rng.randrange(16), 48)
    source, target = placed(rng, axes, 3), placed(rng, axes, 3)
    ours = search.find(shape, 2, ranks, source, target, prices)
    theirs = search.find(shape, 2, ranks, source, target, Volume(2))
    assert ours.cost <= repriced(theirs, prices, shape, 2) * (1 + 1e-9)
    if [move.kind for move in theirs.moves] != ["all_reduce"]:
        assert theirs.cost <= repriced(ours, Volume(2), shape, 2) * (1 + 1e-9)


def test_topology_decides_where_volume_cannot():
    """On two machines, paths of equal volume differ in how much of it crosses the network."""
    prices, rng = AlphaBeta(find_cluster("2xh100x8")), random.Random(7)
    shape, axes, ranks = (1 << 12, 1 << 12, 16), (2, 2, 4), tuple(range(16))
    gains = []
    for _ in range(60):
        ends = placed(rng, axes, 3), placed(rng, axes, 3)
        ours = search.find(shape, 2, ranks, *ends, prices)
        theirs = search.find(shape, 2, ranks, *ends, Volume(2))
        gains.append(repriced(theirs, prices, shape, 2) / ours.cost if ours.cost else 1.0)
    assert max(gains) > 1.5
    assert sum(gain > 1.01 for gain in gains) > 10


@pytest.mark.parametrize("name", ["h100x8", "dgx1", "mi300x8", "2xh100x4", "4xh100x2"])
@pytest.mark.parametrize("numel", [1, 1 << 10, 1 << 24])
def test_nested_partial_sums_take_one_all_reduce(name, numel):
    for axes in ((2, 2), (2, 2, 2)):
        dims = tuple(range(len(axes)))
        source, target = Placed(axes, ((), dims, ())), Placed(axes, (dims, (), ()))
        ranks = tuple(range(math.prod(axes)))
        path = search.find((numel,), 4, ranks, source, target, AlphaBeta(find_cluster(name)))
        assert [move.kind for move in path.moves] == ["all_reduce"]
        assert path.groups(path.moves[0]) == (ranks,)


@pytest.mark.parametrize(
    ("source", "target", "kinds"),
    [
        (((), (), (0, 1), ()), ((0, 1), (), (), ()), ["all_gather"]),
        (((), (0, 1), (), ()), ((), (), (0, 1), ()), ["reduce_scatter"]),
        (((), (), (0, 1), ()), ((), (), (), (0, 1)), ["all_to_all"]),
        (((0, 1), (), (), ()), ((), (), (0,), (1,)), ["slice", "slice"]),
        (((0, 1), (), (), ()), ((), (), (0, 1), ()), ["slice"]),
        (((0, 1), (), (), ()), ((), (0, 1), (), ()), ["vslice"]),
        (((), (), (0, 1), ()), ((), (), (1, 0), ()), ["permute"]),
        (((0,), (), (1,), ()), ((0,), (), (1,), ()), []),
    ],
)
def test_what_one_move_can_do_takes_one(source, target, kinds):
    prices = AlphaBeta(find_cluster("h100x8"))
    ends = Placed((2, 2), source), Placed((2, 2), target)
    path = search.find((4096, 4096), 4, (4, 5, 6, 7), *ends, prices)
    assert [move.kind for move in path.moves] == kinds


def test_misaligned_slices_are_permuted_where_that_is_cheaper():
    """Dim 0 is nested over two axes; a gather frees the inner one, and the outer one is wanted."""
    prices = AlphaBeta(find_cluster("h100x8"))
    source, target = Placed((2, 2), ((), (), (0, 1))), Placed((2, 2), ((0,), (), (1,)))
    path = search.find((1 << 26,), 4, (0, 1, 2, 3), source, target, prices)
    assert [move.kind for move in path.moves] == ["permute", "all_gather"]
    whole = search.find(
        (1 << 26,), 4, (0, 1, 2, 3), source, Placed((2, 2), ((0, 1), (), ())), prices
    )
    assert path.cost < whole.cost


def test_paths_are_remembered_for_groups_of_equal_topology():
    class Counting(AlphaBeta):
        def collective(self, *args):
            asked.append(args)
            return super().collective(*args)

    asked: list = []
    prices = Counting(find_cluster("4xh100x8"))
    ends = Placed((2, 4), ((), (0, 1), (), ())), Placed((2, 4), ((0,), (), (), (1,)))
    first = search.find((64, 128), 4, (0, 1, 2, 3, 8, 9, 10, 11), *ends, prices)
    number = len(asked)
    assert number > 0
    again = search.find((64, 128), 4, (20, 21, 22, 23, 28, 29, 30, 31), *ends, prices)
    assert len(asked) == number
    assert (again.moves, again.cost) == (first.moves, first.cost)
    assert again.ranks == (20, 21, 22, 23, 28, 29, 30, 31)
    other = search.find((64, 128), 4, (0, 1, 8, 9, 16, 17, 24, 25), *ends, prices)
    assert len(asked) > number
    assert other.cost != first.cost


def test_refusals():
    prices = AlphaBeta(find_cluster("h100x8"))
    half, whole = Placed((2,), ((), (), (0,))), Placed((2,), ((0,), (), ()))
    with pytest.raises(UsageError, match=r"splits dim 0 of shape \(5,\) in 2 uneven slices"):
        search.find((5,), 4, (0, 1), half, whole, prices)
    with pytest.raises(UsageError, match="needs 2 ranks"):
        search.find((4,), 4, (0, 1, 2), half, whole, prices)
    with pytest.raises(UsageError, match="share no axes"):
        search.find(
            (4,),
            4,
            (0, 1, 2, 3),
            *(Placed(a, ((*range(len(a)),), (), ())) for a in ((4,), (2, 2))),
            prices,
        )
    with pytest.raises(UsageError, match="too many layouts"):
        search.find(
            (128,), 4, tuple(range(128)), *[Placed((2,) * 7, ((*range(7),), (), ()))] * 2, prices
        )
    with pytest.raises(UsageError, match="are not each of 2 axes once"):
        Placed((2, 2), ((0,), (), (0,)))


@pytest.mark.parametrize(
    ("source", "target", "kind_"),
    [
        (Placed((2,), ((), (), (0,))), Placed((2,), ((), (), (0,))), "move"),
        (Placed((), ((), (), ())), Placed((4,), ((), (), (0,))), "scatter"),
        (Placed((4,), ((), (), (0,))), Placed((), ((), (), ())), "gather"),
        (Placed((2,), ((0,), (), ())), Placed((), ((), (), ())), "move"),
        (Placed((), ((), (), ())), Placed((2,), ((), (0,), ())), "value_scatter"),
    ],
)
def test_a_crossing_changes_one_count_at_most(source, target, kind_):
    prices = AlphaBeta(find_cluster("2xh100x4"))
    there = tuple(range(4, 4 + target.num_ranks))
    route = between.find(
        (1 << 24,), 4, tuple(range(source.num_ranks)), source, there, target, prices
    )
    assert route is not None
    assert route.crossing.kind == kind_
    assert not route.first.moves
    assert not route.last.moves


@pytest.mark.parametrize("numel", [64, 1 << 28])
def test_one_to_many_is_no_dearer_than_a_broadcast_or_scatter_and_gather(numel):
    prices = AlphaBeta(find_cluster("2xh100x8"))
    one, all_, there = Placed((), ((), (), ())), Placed((8,), ((0,), (), ())), tuple(range(8, 16))
    route = between.find((numel,), 4, (0,), one, there, all_, prices)
    assert route is not None
    broadcast = prices.collective("broadcast", 4 * numel, [(0, *there)])
    scatter = prices.messages([(0, rank, numel // 2) for rank in there])
    gather = prices.collective("all_gather", 4 * numel, [there])
    assert 0 < route.cost <= min(broadcast, scatter + gather) * (1 + 1e-9)


@given(st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_a_route_never_costs_more_than_the_one_the_volume_would_choose(rng):
    cluster = find_cluster("2xh100x8")
    grids = [(), (2,), (2, 2), (4,), (2, 2, 2), (8,)]
    shape = (8 << rng.randrange(12), 16)
    axes = rng.choice(grids), rng.choice(grids)
    ranks = [tuple(rng.sample(range(16), math.prod(grid))) for grid in axes]
    source, target = (placed(rng, grid, 2) for grid in axes)
    prices, volume = AlphaBeta(cluster), Volume(4)
    ours = between.find(shape, 4, ranks[0], source, ranks[1], target, prices)
    theirs = between.find(shape, 4, ranks[0], source, ranks[1], target, volume)
    assert ours is not None
    assert theirs is not None
    crossing = theirs.crossing
    if crossing.groups:
        cost = prices.collective("broadcast", crossing.transfers[0].mask.numel * 4, crossing.groups)
    else:
        cost = prices.messages(
            [(t.holding.rank, t.to, t.mask.numel * 4) for t in crossing.transfers]
        )
    cost += repriced(theirs.first, prices, shape, 4) + repriced(theirs.last, prices, shape, 4)
    assert ours.cost <= cost * (1 + 1e-9)


def test_four_dims_over_sixteen_ranks_visit_few_layouts():
    """What a search costs is the layouts it prices; a bound on them keeps it interactive."""
    rng = random.Random(0)
    prices = AlphaBeta(find_cluster("2xh100x8"))
    shape, axes = (64, 64, 64, 64), (2, 2, 2, 2)
    for _ in range(5):
        source, target = placed(rng, axes, 4), placed(rng, axes, 4)
        search.find(shape, 4, tuple(range(16)), source, target, prices)
    space = search.room(shape, source, target)
    assert len(space._known) < 2500
