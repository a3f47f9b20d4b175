"""Adapters rebuild every consumer's part exactly, whatever the producers and the consumers are.

Values are small integers in float64, so that every sum is exact in any order.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import InfeasibleError, UsageError
from toolkit.hardware import find_cluster
from toolkit.plan.materialize import Adapter, backward, interpret, materialize
from toolkit.plan.materialize import regular as regular_way
from toolkit.plan.materialize.adapter import COLLECTIVES, Builder
from toolkit.plan.materialize.gradient import mirror
from toolkit.plan.rvd.layouts import D, Placed
from toolkit.plan.rvd.prices import AlphaBeta, Volume
from toolkit.plan.tensors import Chunk, Mask, PTensor, VTensor

CLUSTER = find_cluster("2xh100x8")
GRIDS = [(), (2,), (3,), (4,), (2, 2), (2, 3), (6,), (2, 2, 2), (2, 4)]
randoms = st.randoms(use_true_random=False)


def part(array, mask):
    return array[tuple(slice(start, end) for start, end in mask.box)]


def integers(rng, shape):
    return np.array([rng.randint(-9, 9) for _ in range(math.prod(shape))], float).reshape(shape)


def regular(rng, tensor):
    """Views of a random layout on random ranks."""
    axes = rng.choice(GRIDS)
    return placed_views(rng, tensor, axes, rng.sample(list(CLUSTER.ranks), math.prod(axes)))


def placed_views(rng, tensor, axes, ranks):
    """Views of a random layout that divides the tensor evenly."""
    while True:
        slots = [[] for _ in range(D + len(tensor.shape))]
        for axis in rng.sample(range(len(axes)), len(axes)):
            slots[rng.randrange(len(slots))].append(axis)
        layout = Placed(axes, tuple(map(tuple, slots)))
        if all(s % d == 0 for s, d in zip(tensor.shape, layout.layout.dims, strict=True)):
            break
    pairs = zip(ranks, layout.masks(tensor.shape), strict=True)
    return [VTensor(tensor, mask, rank, f"op{rank}") for rank, mask in pairs]


def tiles(rng, mask, depth):
    """Cut a mask in random places, along dims and by value."""
    if depth == 0 or rng.random() < 0.2:
        return [mask]
    dim = rng.randrange(len(mask.box) + 1)
    if dim == len(mask.box):
        parts = rng.choice([2, 3])
        pieces = [mask.share(i, parts) for i in range(parts)]
    elif mask.shape[dim] < 2:
        pieces = [mask]
    else:
        cut = rng.randrange(1, mask.shape[dim])
        full = [(0, size) for size in mask.shape]
        pieces = [
            mask.at(Mask((*full[:dim], ends, *full[dim + 1 :])))
            for ends in ((0, cut), (cut, mask.shape[dim]))
        ]
    return [tile for piece in pieces for tile in tiles(rng, piece, depth - 1)]


def irregular_producers(rng, tensor):
    masks = tiles(rng, Mask.whole(tensor.shape), 4)
    masks += [rng.choice(masks) for _ in range(rng.randrange(3))]  # replicas
    if rng.random() < 0.3:  # in another way as well
        masks += tiles(rng, Mask.whole(tensor.shape), 3)
    return [VTensor(tensor, mask, rng.randrange(16), f"op{i}") for i, mask in enumerate(masks)]


def irregular_consumers(rng, tensor):
    masks = []
    for _ in range(rng.randint(1, 6)):
        box = []
        for size in tensor.shape:
            start = rng.randrange(size)
            box.append((start, rng.randint(start + 1, size)))
        mask = Mask(tuple(box))
        values = rng.choice([1, 1, 2, 3])
        masks += [mask.share(i, values) for i in range(values)]
    return [VTensor(tensor, mask, rng.randrange(16), f"use{i}") for i, mask in enumerate(masks)]


def held(rng, tensor, full, producers):
    """What producers hold so that every family of partial sums adds up to the full tensor.

    All decompositions are made from one: the value of the smallest shares of [0, 1).
    """
    finest = math.lcm(1, *(view.mask.chunk.parts for view in producers))
    shares = [integers(rng, tensor.shape) for _ in range(finest - 1)]
    shares.append(full - sum(shares))
    found = []
    for view in producers:
        low, high = (int(end * finest) for end in (view.mask.chunk.low, view.mask.chunk.high))
        found.append(part(sum(shares[low:high]), view.mask))
    return found


def check_outputs(tensor, full, consumers, outputs):
    """Whole parts are slices; partial sums add up, and those of one share are the same."""
    shares: dict[tuple, np.ndarray] = {}
    for view, value in zip(consumers, outputs, strict=True):
        assert value.shape == view.mask.shape
        if view.mask.chunk.is_whole:
            np.testing.assert_array_equal(value, part(full, view.mask))
        else:
            known = shares.setdefault((view.mask.box, view.mask.chunk), value)
            np.testing.assert_array_equal(value, known)
    for box in {box for box, _ in shares}:
        chunks = [chunk for b, chunk in shares if b == box]
        if sum(chunk.high - chunk.low for chunk in chunks) == 1:
            total = sum(shares[box, chunk] for chunk in chunks)
            np.testing.assert_array_equal(total, part(full, Mask(box)))


def check_structure(adapter):
    """Every step's buffers are on its ranks, written once, before they are read."""
    known = set(adapter.inputs)
    for step in adapter.steps:
        assert set(step.reads) <= known
        assert not set(step.writes) & known
        known |= set(step.writes)
        assert {adapter.buffer[name].rank for name in (*step.reads, *step.writes)} == set(
            step.ranks
        )
    assert set(adapter.outputs) <= known
    assert [step.phase for step in adapter.steps] == sorted(step.phase for step in adapter.steps)
    assert len(adapter.phase_s) == 1 + max((step.phase for step in adapter.steps), default=-1)


shapes = st.lists(st.sampled_from([4, 6, 12]), min_size=1, max_size=3).map(tuple)


@given(randoms, shapes)
@settings(max_examples=250, deadline=None)
def test_regular_layouts_are_rebuilt(rng, shape):
    tensor = PTensor("x", shape)
    producers, consumers = regular(rng, tensor), regular(rng, tensor)
    full = integers(rng, shape)
    adapter = materialize(tensor, producers, consumers, CLUSTER)
    check_structure(adapter)
    outputs = interpret.run(adapter, held(rng, tensor, full, producers))
    check_outputs(tensor, full, consumers, outputs)
    for seconds in adapter.others.values():
        assert adapter.seconds <= seconds * (1 + 1e-5)


@given(randoms, st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple))
@settings(max_examples=250, deadline=None)
def test_any_boxes_and_partial_sums_are_rebuilt(rng, shape):
    tensor = PTensor("x", shape)
    producers = irregular_producers(rng, tensor)
    consumers = irregular_consumers(rng, tensor)
    if rng.random() < 0.3:
        consumers = regular(rng, tensor)
    full = integers(rng, shape)
    adapter = materialize(tensor, producers, consumers, CLUSTER)
    check_structure(adapter)
    outputs = interpret.run(adapter, held(rng, tensor, full, producers))
    check_outputs(tensor, full, consumers, outputs)


def test_every_path_rebuilds_whether_it_would_be_chosen_or_not():
    """Collectives forced on random layouts, searched under several costs, and all kinds of them."""
    rng, seen = random.Random(0), set()
    shape = (12, 24)
    tensor = PTensor("x", shape)
    every = [Volume(4), *(AlphaBeta(find_cluster(n)) for n in ("2xh100x8", "16xl4", "2xdgx1"))]
    for _ in range(400):
        prices, grid = rng.choice(every), rng.choice([g for g in GRIDS if len(g) > 1])
        sides = [regular(rng, tensor), regular(rng, tensor)]
        if rng.random() < 0.5:  # one group, so that a path inside it is searched
            ranks = rng.sample(range(16), math.prod(grid))
            sides = [placed_views(rng, tensor, grid, ranks) for _ in range(2)]
        held_, wanted = ({view.rank: view.mask for view in side} for side in sides)
        found = regular_way.way(tensor, held_, wanted, prices)
        if found is None:
            assert max(map(len, sides)) % min(map(len, sides))
            continue
        builder = Builder(tensor)
        inputs = [builder.buffer(v.rank, v.mask, f"p{i}") for i, v in enumerate(sides[0])]
        adapter = regular_way.build(builder, inputs, held_, sides[1], found, prices)
        check_structure(adapter)
        full = integers(rng, shape)
        outputs = interpret.run(adapter, held(rng, tensor, full, sides[0]))
        check_outputs(tensor, full, sides[1], outputs)
        assert adapter.seconds == pytest.approx(found.cost)
        seen |= {step.kind for step in adapter.steps}
    assert seen >= COLLECTIVES | {"send", "slice", "pad", "zero", "concat", "sum"}


def kinds(adapter):
    return [step.kind for step in adapter.communication]


def views(tensor, masks, ranks=None, op="op"):
    ranks = range(len(masks)) if ranks is None else ranks
    return [
        VTensor(tensor, m, r, f"{op}{i}") for i, (m, r) in enumerate(zip(masks, ranks, strict=True))
    ]


def slices(tensor, dim, num):
    return [Mask.whole(tensor.shape).split(dim, i, num) for i in range(num)]


def shares(tensor, num):
    return [Mask.whole(tensor.shape).share(i, num) for i in range(num)]


BIG = PTensor("x", (4096, 4096))
WHOLE = Mask.whole(BIG.shape)


@pytest.mark.parametrize(
    ("held_", "wanted", "forward", "mirrored"),
    [
        # Megatron's row-parallel output, and its sequence-parallel variant
        (shares(BIG, 4), [WHOLE] * 4, ["all_reduce"], ["all_reduce"]),
        (shares(BIG, 4), slices(BIG, 0, 4), ["reduce_scatter"], ["all_gather"]),
        (slices(BIG, 0, 4), [WHOLE] * 4, ["all_gather"], ["reduce_scatter"]),
        (slices(BIG, 0, 4), slices(BIG, 1, 4), ["all_to_all"], ["all_to_all"]),
        ([WHOLE] * 4, slices(BIG, 0, 4), [], ["all_gather"]),
        (slices(BIG, 1, 4), slices(BIG, 1, 4), [], []),
        # a column-parallel input: nothing forward, one all-reduce backward
        ([WHOLE] * 4, [WHOLE] * 4, [], ["all_reduce"]),
    ],
)
def test_the_backward_adapter_mirrors_the_forward_one(held_, wanted, forward, mirrored):
    # A replicated producer is one operator run on every rank; consumers are different parts.
    made = [VTensor(BIG, mask, rank, "same" if mask == WHOLE else f"part{rank}")
            for rank, mask in enumerate(held_)]  # fmt: skip
    used = views(BIG, wanted)
    assert kinds(materialize(BIG, made, used, CLUSTER)) == forward
    assert kinds(backward(BIG, made, used, CLUSTER)) == mirrored


def test_replicas_of_one_operator_need_no_reduction():
    same = [VTensor(BIG, WHOLE, rank, "norm") for rank in range(4)]
    assert kinds(backward(BIG, same, same, CLUSTER)) == []
    parts = views(BIG, [WHOLE] * 4)
    assert kinds(backward(BIG, same, parts, CLUSTER)) == ["all_reduce"]


@given(randoms, st.booleans())
@settings(max_examples=150, deadline=None)
def test_gradients_are_the_sum_over_all_readers(rng, even):
    """Each reader's gradient goes to every producer that made what it read."""
    tensor = PTensor("x", (12,) if even else (7, 3))
    make = regular if even else irregular_producers
    producers = make(rng, tensor)
    consumers = [
        VTensor(tensor, Mask(view.mask.box), view.rank, view.op)
        for view in (regular(rng, tensor) if even else irregular_consumers(rng, tensor))
    ]
    adapter = backward(tensor, producers, consumers, CLUSTER)
    seen = mirror(tensor, producers, consumers)
    gradients = [integers(rng, view.mask.shape) for view in consumers]
    by_op: dict[str, int] = {}
    for index, view in enumerate(consumers):
        first = by_op.setdefault(view.op, index)
        if consumers[first].mask == view.mask:
            gradients[index] = gradients[first]
    total = np.zeros(tensor.shape)
    for index in by_op.values():
        part(total, consumers[index].mask)[...] += gradients[index]
    inputs = []
    for view, index in zip(seen.producers, seen.of, strict=True):
        inside = Mask(view.mask.box).within(consumers[index].mask)
        inputs.append(part(gradients[index], Mask(inside)))
    outputs = interpret.run(adapter, inputs)
    for view, value in zip(producers, outputs, strict=True):
        np.testing.assert_array_equal(value, part(total, view.mask))


def test_shares_that_are_read_get_the_whole_gradient():
    """A bias shared out over the parts of a split reduction: each share has the gradient of all."""
    bias = PTensor("bias", (8,))
    made = [VTensor(bias, Mask.whole((8,)), 0, "load")]
    used = views(bias, shares(bias, 2))
    seen = mirror(bias, made, used)
    assert [view.mask.chunk for view in seen.producers] == [Chunk(0, 1, 1)] * 2
    assert kinds(backward(bias, made, used, CLUSTER)) == []
    with pytest.raises(InfeasibleError, match="let every partial sum be read by as many"):
        mirror(bias, made, [*used, VTensor(bias, used[0].mask, 2, "again")])


def test_a_replica_on_the_same_device_is_used():
    producers = views(BIG, [WHOLE] * 2, ranks=[3, 9])
    consumers = views(BIG, slices(BIG, 0, 2), ranks=[9, 3])
    adapter = materialize(BIG, producers, consumers, CLUSTER)
    assert adapter.route == "local"
    assert adapter.seconds == 0
    assert {step.kind for step in adapter.steps} == {"slice"}


def test_the_nearest_replica_is_used():
    producers = views(BIG, [WHOLE] * 2, ranks=[0, 8])
    adapter = materialize(BIG, producers, views(BIG, [WHOLE], ranks=[12]), CLUSTER)
    assert [step.ranks for step in adapter.communication] == [(8, 12)]


def test_co_sharded_parts_are_put_together_before_they_travel():
    """Four parts on two ranks, run one after another: one reduction of two ranks, not of four."""
    producers = views(BIG, shares(BIG, 4), ranks=[0, 0, 1, 1])
    adapter = materialize(BIG, producers, views(BIG, [WHOLE] * 2), CLUSTER)
    assert kinds(adapter) == ["all_reduce"]
    assert adapter.communication[0].ranks == (0, 1)
    assert [step.kind for step in adapter.steps[:2]] == ["sum", "sum"]


def test_what_a_rank_has_received_is_not_sent_again():
    producers = views(BIG, [WHOLE])
    consumers = views(BIG, [WHOLE, *slices(BIG, 0, 2)], ranks=[1, 1, 1])
    adapter = materialize(BIG, producers, consumers, CLUSTER)
    assert kinds(adapter) == ["send"]


def test_parts_that_overlap_are_sent_once():
    tensor = PTensor("x", (4, 4))
    wants = [Mask(((0, 2), (0, 4))), Mask(((1, 3), (0, 2)))]  # no box holds just these
    adapter = materialize(
        tensor, views(tensor, [Mask.whole((4, 4))]), views(tensor, wants, ranks=[1, 1]), CLUSTER
    )
    assert sum(step.num_bytes for step in adapter.communication) == 10 * tensor.item_bytes


def test_parts_with_a_gap_are_not_taken_for_what_surrounds_them():
    """Rank 0 made the first and last quarters; it needs the others from rank 1, which has all."""
    quarters = slices(BIG, 0, 4)
    producers = views(BIG, [quarters[0], quarters[3], WHOLE], ranks=[0, 0, 1])
    adapter = materialize(BIG, producers, views(BIG, [WHOLE] * 2), CLUSTER)
    assert sum(step.num_bytes for step in adapter.communication) == BIG.num_bytes // 2


def test_gradients_of_readers_on_one_rank_are_added_before_they_travel():
    """Two operators, each split over the same two ranks, read one replicated tensor."""
    made = [VTensor(BIG, WHOLE, rank, "norm") for rank in (0, 1)]
    used = [VTensor(BIG, WHOLE, rank, f"{op}{rank}") for op in "qk" for rank in (0, 1)]
    adapter = backward(BIG, made, used, CLUSTER)
    assert [step.kind for step in adapter.steps] == ["sum", "sum", "all_reduce"]


def test_predictions_add_up_and_say_what_else_there_was():
    producers, consumers = views(BIG, shares(BIG, 8)), views(BIG, [WHOLE] * 8)
    adapter = materialize(BIG, producers, consumers, CLUSTER)
    assert adapter.seconds == pytest.approx(sum(step.seconds for step in adapter.steps))
    assert adapter.others["each part by sends"] > adapter.seconds
    assert "all_reduce over [0, 1, 2, 3, 4, 5, 6, 7]: 64 MiB" in str(adapter)
    assert len(adapter.of_rank(3)) == 1


def test_an_adapter_survives_being_written_as_json():
    producers, consumers = views(BIG, shares(BIG, 4)), views(BIG, slices(BIG, 1, 4), [4, 5, 6, 7])
    adapter = materialize(BIG, producers, consumers, CLUSTER)
    assert adapter.steps
    assert Adapter.from_body(json.loads(json.dumps(adapter.to_body()))) == adapter


def test_refusals():
    with pytest.raises(UsageError, match="is not whole"):
        materialize(BIG, views(BIG, shares(BIG, 2)[:1]), views(BIG, [WHOLE]), CLUSTER)
    other = PTensor("y", BIG.shape)
    with pytest.raises(UsageError, match="is no part of x"):
        materialize(BIG, views(BIG, [WHOLE]), views(other, [WHOLE]), CLUSTER)
    with pytest.raises(UsageError, match="has no rank 16"):
        materialize(BIG, views(BIG, [WHOLE]), views(BIG, [WHOLE], ranks=[16]), CLUSTER)


def test_the_worked_example_of_the_docs_prints_what_it_says(capsys):
    page = Path(__file__).parents[2] / "docs" / "concepts" / "data-dependencies.md"
    text = page.read_text("utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    exec(compile(code, str(page), "exec"), {})
    assert capsys.readouterr().out == text.split("```text\n")[1].split("```")[0]
