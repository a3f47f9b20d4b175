"""The parameters of one rank: its slices of the model's, their gradients, and whole tensors again.

A slice lies along mesh axes like any DTensor's, and is one to the outside: checkpoints are
resharded by torch, and a whole tensor is gathered by it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

from toolkit.errors import UsageError
from toolkit.plan.lower.program.exchange import Exchange, Slot
from toolkit.plan.lower.program.write import AXES, Written
from toolkit.plan.plan import AxisName
from toolkit.plan.tensors import Mask, overlap


class Weight:
    """One parameter on this rank. `local` is what operators read, `parameter` what others see.

    They share memory. `sums` are the gradients of this step, one a slot of its exchange.
    """

    def __init__(
        self,
        name: str,
        whole: nn.Parameter,
        rank: int,
        mask: Mask,
        exchange: Exchange,
        mesh: DeviceMesh,
        placements: Mapping[AxisName, int],
    ) -> None:
        self.name, self.mask, self.exchange = name, mask, exchange
        piece = whole.detach()[tuple(slice(*span) for span in mask.box)].clone()
        self.local = piece
        self.axes = tuple(placements)
        self._mesh = mesh[self.axes] if self.axes else None
        self._placements: tuple[Placement, ...] = tuple(
            Shard(placements[axis]) for axis in self.axes
        )
        self._shape, self._stride = whole.shape, whole.stride()
        self.parameter = nn.Parameter(self.outside(piece), whole.requires_grad)
        self.sums: dict[Slot, Tensor] = {}
        self._owned: set[Slot] = set()
        # Where slots are slices that tile what is held, their gradients are made in place.
        self.tiled = _tile(exchange, rank, mask)
        self.gradient: Tensor | None = None

    def outside(self, piece: Tensor) -> Tensor:
        """Return a tensor of the slice's shape as the DTensor it is a part of."""
        if self._mesh is None:
            return piece
        return DTensor.from_local(
            piece, self._mesh, self._placements, run_check=False,
            shape=self._shape, stride=self._stride,
        )  # fmt: skip

    def add(self, slot: Slot, value: Tensor) -> None:
        """Add to the gradient. The first value may be shared with others, and is not written to."""
        if self.tiled:
            self._add_slice(slot, value)
        elif slot not in self.sums:
            self.sums[slot] = value
        elif slot in self._owned:
            self.sums[slot] += value
        else:
            self.sums[slot] = self.sums[slot] + value
            self._owned.add(slot)

    def _add_slice(self, slot: Slot, value: Tensor) -> None:
        """Add where the slice lies in one gradient, so that co-shards need not be joined."""
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.local)
        if slot not in self.sums:
            self.sums[slot] = cut(self.gradient, self.mask, slot.mask)
        self.sums[slot] += value

    def forget(self) -> None:
        """Begin a new step."""
        self.gradient = None
        self.sums.clear()
        self._owned.clear()

    def part(self, mask: Mask) -> Tensor:
        """Return the part of the weight that an operator reads.

        Of partial sums the first gets the value; the others get zeros.
        """
        value = self.local
        for dim, (start, end) in enumerate(Mask(mask.box).within(self.mask)):
            if (start, end) != (0, value.shape[dim]):
                value = value.narrow(dim, start, end - start)
        return value if mask.chunk.low == 0 else torch.zeros_like(value)


def _tile(exchange: Exchange, rank: int, held: Mask) -> bool:
    """Whether a rank's slots are several slices of what it holds, that just make it up."""
    mine = [slot for slot in exchange.slots if slot.rank == rank]
    apart = all(
        overlap(a.mask.box, b.mask.box) is None for i, a in enumerate(mine) for b in mine[:i]
    )
    same = len({slot.alike for slot in mine}) == 1 and all(s.mask.chunk.is_whole for s in mine)
    whole = sum(slot.mask.numel for slot in mine) == held.numel
    return len(mine) > 1 and apart and same and whole


def axes_of(
    name: str, held: Mapping[int, Mask], rank: int, written: Written
) -> dict[AxisName, int]:
    """Return the mesh axes a parameter is sliced along -> the dim, from `rank`'s point of view.

    Raises UsageError when the slices are not equal ones along axes, which only a plan with splits
    that overlap makes.
    """
    plan, shape = written.plan, written.graph.tensors[name].shape
    found: dict[AxisName, int] = {}
    for axis in AXES:
        near = [other for other in plan.along(axis, rank) if other in held]
        boxes = [held[other].box for other in near]
        if len(set(boxes)) == 1:
            continue
        dims = [dim for dim in range(len(shape)) if len({box[dim] for box in boxes}) > 1]
        if len(dims) != 1 or len(set(boxes)) != plan.size(axis):
            raise _uneven(name, held)
        found[axis] = dims[0]
    # Rebuild the rank's slice as torch would, outermost axis first.
    expected = [(0, size) for size in shape]
    for axis, dim in found.items():
        low, high = expected[dim]
        size, rest = divmod(high - low, plan.size(axis))
        if rest:
            raise _uneven(name, held)
        place = plan.along(axis, rank).index(rank)
        expected[dim] = (low + place * size, low + (place + 1) * size)
    if tuple(expected) != held[rank].box:
        raise _uneven(name, held)
    return found


def _uneven(name: str, held: Mapping[int, Mask]) -> UsageError:
    some = ", ".join(f"{mask} on rank {rank}" for rank, mask in itertools.islice(held.items(), 4))
    return UsageError(
        f"{name} is held in slices that are not equal along the mesh: {some}",
        remedy="split the operators that share it alike",
    )


def cut(value: Tensor, held: Mask, wanted: Mask) -> Tensor:
    """Return the part of a value (of `held`) that a mask inside it means."""
    assert overlap(held.box, wanted.box) == wanted.box
    for dim, (start, end) in enumerate(Mask(wanted.box).within(Mask(held.box))):
        if (start, end) != (0, value.shape[dim]):
            value = value.narrow(dim, start, end - start)
    return value
