"""Running a part that reads around itself: its pieces joined, and padded at the tensor's edges."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from toolkit.ir.dims import Annotation, Halo, Spec
from toolkit.ir.graph import Argument
from toolkit.plan.tensors import Interval, Mask

if TYPE_CHECKING:
    import torch

# The pieces of all inputs, in the order of Part.reads -> the inputs.
Joiner = Callable[[Sequence["torch.Tensor"]], list["torch.Tensor"]]


def shape(masks: Sequence[Mask]) -> tuple[int, ...]:
    """Return the shape that the pieces of one input are joined to."""
    spans = zip(*(mask.box for mask in masks), strict=True)
    return tuple(sum(high - low for low, high in set(some)) for some in spans)


def arguments(
    given: Mapping[str, Argument], found: Annotation, region: Mapping[str, Interval]
) -> dict[str, Argument]:
    """Return the arguments of a part: where it was given what lies around, there is no more to do
    for the operator.
    """
    made = dict(given)
    for halo in found.halos.values():
        if halo.of in region:
            name, place = halo.argument
            numbers = made[name]
            assert isinstance(numbers, tuple)
            made[name] = (*numbers[:place], 0, *numbers[place + 1 :])
    return made


def joiner(found: Annotation, region: Mapping[str, Interval]) -> Joiner | None:
    """Return what joins the pieces of a part; None where every input is in one piece as it is."""
    halos = [_split(spec, found, region) for spec in found.inputs]
    if not any(halos):
        return None

    def join(pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        rest = iter(pieces)
        made = []
        for several in halos:
            counts = [len(halo.reads(*region[halo.of])) for _, halo in several]
            mine = list(itertools.islice(rest, math.prod(counts)))
            made.append(_joined(mine, several, region))
        return made

    return join


def _split(spec: Spec, found: Annotation, region: Mapping[str, Interval]) -> list[tuple[int, Halo]]:
    """The dims of an input along which a part reads around itself."""
    halos = [
        (dim, found.halos[axis[0]])
        for dim, axis in enumerate(spec)
        if axis and axis[0] in found.halos
    ]
    return [(dim, halo) for dim, halo in halos if halo.of in region]


def _joined(
    pieces: list[torch.Tensor],
    several: Sequence[tuple[int, Halo]],
    region: Mapping[str, Interval],
) -> torch.Tensor:
    import torch
    from torch.nn import functional

    for dim, halo in reversed(several):  # the last dim's pieces are next to each other
        start, end = region[halo.of]
        count = len(halo.reads(start, end))
        if count > 1:
            groups = [pieces[at : at + count] for at in range(0, len(pieces), count)]
            pieces = [torch.cat(group, dim) for group in groups]
        before, after = halo.padding(start, end)
        if before or after:
            behind = [0, 0] * (pieces[0].dim() - dim - 1)
            pieces = [
                functional.pad(piece, [*behind, before, after], value=halo.fill) for piece in pieces
            ]
    (made,) = pieces
    return made
