"""Rules for dims.annotation, continued: operators that only rearrange a tensor, or make one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from toolkit.ir.dims import Builder, Spec
from toolkit.ir.splits import broadcast, place, rule

# Looking at it differently -------------------------------------------------------------------


@rule("transpose", "swapaxes")
def _transpose(b: Builder) -> None:
    spec = list(b.fresh(b.in_shapes[0]))
    b.inputs[0] = tuple(spec)
    first, second = (place(b.op.arguments[name], len(spec)) for name in ("dim0", "dim1"))
    spec[first], spec[second] = spec[second], spec[first]
    b.outputs[0] = tuple(spec)


@rule("t", "mT", "numpy_T")
def _t(b: Builder) -> None:
    spec = b.fresh(b.in_shapes[0])
    b.inputs[0] = spec
    b.outputs[0] = (*spec[:-2], *reversed(spec[-2:]))


@rule("permute")
def _permute(b: Builder) -> None:
    spec = b.fresh(b.in_shapes[0])
    b.inputs[0] = spec
    b.outputs[0] = tuple(spec[place(dim, len(spec))] for dim in b.op.arguments["dims"])


@rule("unsqueeze")
def _unsqueeze(b: Builder) -> None:
    spec = b.fresh(b.in_shapes[0])
    dim = place(b.op.arguments["dim"], len(spec) + 1)
    b.inputs[0] = spec
    b.outputs[0] = (*spec[:dim], (), *spec[dim:])


@rule("squeeze")
def _squeeze(b: Builder) -> None:
    spec = b.fresh(b.in_shapes[0])
    b.inputs[0] = spec
    given = b.op.arguments.get("dim")
    dims = range(len(spec)) if given is None else [given] if isinstance(given, int) else given
    gone = {place(dim, len(spec)) for dim in dims if b.in_shapes[0][dim] == 1}
    # A dim that is named and stays, being larger than 1, would go if a part of it were of size 1.
    b.fixed(*(spec[place(dim, len(spec))] for dim in dims))
    b.outputs[0] = tuple(axis for dim, axis in enumerate(spec) if dim not in gone)


@rule("expand", "expand_as")
def _expand(b: Builder) -> None:
    broadcast(b)


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten")
def _reshape(b: Builder) -> None:
    """Dims that are merged or divided are made of the factors both sides share, in order."""
    before, after = b.in_shapes[0], b.out_shapes[0]
    if math.prod(before) == 0:
        return
    b.inputs[0], b.outputs[0] = factors(b, before, after)
    if b.op.kind == "aten.unflatten":
        b.fixed(*b.inputs[0])  # its sizes would have to shrink with the part


def factors(b: Builder, before: Sequence[int], after: Sequence[int]) -> tuple[Spec, Spec]:
    """Return specs of two shapes of equal size whose dims share factors where they can."""
    first: list[list[str]] = [[] for _ in before]
    second: list[list[str]] = [[] for _ in after]
    left = [[index, size] for index, size in enumerate(before) if size != 1]
    right = [[index, size] for index, size in enumerate(after) if size != 1]
    # From the back, take the smaller factor from both sides while it divides the larger one.
    while left and right:
        (i, m), (j, n) = left[-1], right[-1]
        small, large = min(m, n), max(m, n)
        if large % small:
            _skip(b, (left, first), (right, second))
            continue
        (name,) = b.new(small)
        first[i].insert(0, name)
        second[j].insert(0, name)
        left[-1][1], right[-1][1] = m // small, n // small
        for side in (left, right):
            if side[-1][1] == 1:
                side.pop()
    return tuple(map(tuple, first)), tuple(map(tuple, second))


def _skip(b: Builder, *sides: tuple[list[list[int]], list[list[str]]]) -> None:
    """Take dims from both sides until as much is taken of each; none of these can be split."""
    taken = [1, 1]
    while taken[0] == 1 or taken[0] != taken[1]:
        side = 0 if taken[0] <= taken[1] else 1
        rest, specs = sides[side]
        index, size = rest.pop()
        (name,) = b.new(size, "^")
        specs[index].insert(0, name)
        taken[side] *= size


# Made from nothing ---------------------------------------------------------------------------


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
def _creation(b: Builder) -> None:
    b.outputs[0] = b.fresh(b.out_shapes[0])
    for index, shape in enumerate(b.in_shapes):  # read for its dtype only
        b.inputs[index] = b.fresh(shape, "^")


@rule("arange", "linspace", "rand", "randn", "randint")
def _whole(b: Builder) -> None:
    """Values depend on the place, or on one stream of random numbers: a part makes them all."""
    b.outputs[0] = b.fresh(b.out_shapes[0], "^")
