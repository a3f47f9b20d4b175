"""Masks are sets of (element, share of its value); their algebra is checked against such sets."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import UsageError
from toolkit.plan.tensors import (
    WHOLE,
    Chunk,
    Mask,
    PTensor,
    VTensor,
    atoms,
    check_tiling,
    depends,
    family,
    missing,
)

SHAPE = (5, 4)
FINEST = math.lcm(*range(1, 7))


@st.composite
def chunks(draw):
    parts = draw(st.integers(1, 6))
    start = draw(st.integers(0, parts - 1))
    return Chunk(start, draw(st.integers(start + 1, parts)), parts)


@st.composite
def masks(draw):
    box = []
    for size in SHAPE:
        start = draw(st.integers(0, size - 1))
        box.append((start, draw(st.integers(start + 1, size))))
    return Mask(tuple(box), draw(chunks()))


def cells(mask):
    """Every (indices, smallest share of the value) that a mask holds."""
    spans = [range(*interval) for interval in mask.box]
    low, high = mask.chunk.low * FINEST, mask.chunk.high * FINEST
    assert low.denominator == high.denominator == 1
    return set(itertools.product(*spans, range(int(low), int(high))))


@given(masks(), masks())
def test_intersection_containment_and_difference_are_those_of_sets(one, other):
    both = one & other
    assert (cells(both) if both else set()) == cells(one) & cells(other)
    assert (other in one) == (cells(other) <= cells(one))
    left = one.minus(other)
    assert sum(len(cells(part)) for part in left) == len(set().union(*map(cells, left)))
    assert set().union(*map(cells, left)) == cells(one) - cells(other)


@given(masks(), st.data())
def test_a_part_of_a_part_is_a_part(outer, data):
    inner = Mask(
        tuple(
            (start, data.draw(st.integers(start + 1, size)))
            for size in outer.shape
            for start in [data.draw(st.integers(0, size - 1))]
        ),
        Chunk.part(data.draw(st.integers(0, 1)), 2),
    )
    made = outer.at(inner)
    assert made in outer
    assert made.shape == inner.shape
    assert made.within(outer) == inner.box
    width = outer.chunk.high - outer.chunk.low
    assert made.chunk.high - made.chunk.low == width / 2


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4))
def test_parts_tile_what_they_are_parts_of(size, parts, values):
    tensor = PTensor("x", (size, 3))
    whole = Mask.whole(tensor.shape)
    if parts > size:
        with pytest.raises(UsageError, match="no part"):
            whole.split(0, 0, parts)
        return
    made = [whole.split(0, i, parts).share(j, values) for i in range(parts) for j in range(values)]
    views = [VTensor(tensor, mask, rank) for rank, mask in enumerate(made)]
    check_tiling(tensor, views)
    check_tiling(tensor, [*views, *views])  # replicas may repeat
    assert all((a & b) is None for a, b in itertools.combinations(made, 2))
    sizes = [mask.shape[0] for mask in made]
    assert max(sizes) - min(sizes) <= 1
    if len(made) > 1:
        with pytest.raises(UsageError, match="is not whole"):
            check_tiling(tensor, views[1:])


@given(st.lists(masks(), min_size=1, max_size=6))
def test_atoms_cut_space_where_any_box_does(several):
    boxes = [mask.box for mask in several]
    found = atoms(boxes)
    for index, box in enumerate(boxes):
        mine = [atom for atom, holders in found.items() if index in holders]
        assert sum(Mask(atom).numel for atom in mine) == Mask(box).numel
        assert all(Mask(atom) in Mask(box) for atom in mine)
    assert all((Mask(a) & Mask(b)) is None for a, b in itertools.combinations(found, 2))


@given(st.lists(chunks(), max_size=6))
def test_a_family_adds_up_and_is_the_smallest(several):
    found = family(several)
    tilings = [
        some
        for count in range(1, len(set(several)) + 1)
        for some in itertools.combinations(sorted(set(several)), count)
        if sum(c.high - c.low for c in some) == 1
        and all((a & b) is None for a, b in itertools.combinations(some, 2))
    ]
    assert (found is None) == (not tilings)
    if found is not None:
        assert len(found) == min(map(len, tilings))
        assert tuple(sorted(found)) in {tuple(sorted(some)) for some in tilings}


@given(st.lists(masks(), max_size=5))
def test_what_is_missing_has_no_family(several):
    tensor = PTensor("x", SHAPE)
    gaps = [Mask(box) for box in missing(tensor, several)]
    for element in itertools.product(*map(range, SHAPE)):
        point = Mask(tuple((i, i + 1) for i in element))
        held = [mask.chunk for mask in several if point in Mask(mask.box)]
        assert (family(held) is None) == any(point in gap for gap in gaps)


def test_dependencies_need_the_same_tensor_and_masks_that_meet():
    x, y = PTensor("x", (4, 4)), PTensor("y", (4, 4))
    top, bottom = (Mask.whole((4, 4)).split(0, i, 2) for i in (0, 1))
    left = Mask.whole((4, 4)).split(1, 0, 2)
    assert depends(VTensor(x, top, 0), VTensor(x, left, 1))
    assert not depends(VTensor(x, top, 0), VTensor(x, bottom, 1))
    assert not depends(VTensor(x, top, 0), VTensor(y, left, 1))
    assert not depends(VTensor(x, top.share(0, 2), 0), VTensor(x, left.share(1, 2), 1))
    assert depends(VTensor(x, top.share(1, 2), 0), VTensor(x, left, 1))


def test_scalars_have_one_element_and_shares():
    loss = PTensor("loss", ())
    halves = [VTensor(loss, Mask.whole(()).share(i, 2), i) for i in (0, 1)]
    check_tiling(loss, halves)
    assert missing(loss, [halves[0].mask]) == ((),)


def test_refusals_name_the_view_and_what_is_wrong():
    x = PTensor("x", (4,))
    whole = Mask.whole((4,))
    with pytest.raises(UsageError, match=r"relu on rank 3 sees \[2:6\] of x, which has shape"):
        VTensor(x, Mask(((2, 6),)), 3, "relu")
    with pytest.raises(UsageError, match=r"mm x.* on rank 1 is a partial sum that no others"):
        check_tiling(x, [VTensor(x, whole, 0, "mm"), VTensor(x, whole.share(1, 2), 1, "mm")])
    with pytest.raises(UsageError, match=r"x\[2:4\] is not whole: nothing produces it"):
        check_tiling(x, [VTensor(x, whole.split(0, 0, 2), 0)])
    with pytest.raises(UsageError, match="needs 0 <= start < stop <= parts"):
        Chunk(2, 2, 4)
    with pytest.raises(UsageError, match="unknown dtype"):
        PTensor("x", (4,), "float31")
    with pytest.raises(UsageError, match="reaches outside"):
        whole.split(0, 0, 2).at(whole)
    assert WHOLE.is_whole
