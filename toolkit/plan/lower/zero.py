"""ZeRO-1 and ZeRO-2 (Rajbhandari et al. 2020, arXiv 1910.02054) over the data axis of n ranks.

The parameters of a unit lie in one flat buffer, padded to a multiple of n elements; rank r's
optimizer updates the r-th n-th of it, and keeps moments of that part alone.

What is communicated, for m microbatches and P = bytes of a unit's trained parameters, padded so:
- ZeRO-1: one reduce-scatter of P a unit, in the last microbatch's backward. Until then every rank
  adds up whole gradients, as under data parallelism.
- ZeRO-2: one reduce-scatter of P a unit and microbatch; what arrives is added to an n-th, and the
  whole gradient is freed: those of two units are alive at most.
- with a replica axis, each reduce-scatter is followed by an all-reduce of P / n over it.
- after the optimizer's step, one all-gather of P a unit (`Zero.after_update`), which is no part of
  `Lowered.step` and so not of a prediction's traffic; its time is part of a training step's.
A unit whose parameters have several types has a buffer for each. Under ZeRO-1, ranks that share a
machine's CPUs meet over all units after the last backward, in memory (shared.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from toolkit.plan.lower import shared
from toolkit.plan.lower.compat import relocate
from toolkit.plan.lower.data import (
    Gradients,
    Named,
    by_dtype,
    device,
    like,
    local,
    size,
    take,
    units,
)
from toolkit.plan.lower.lowered import Landed, whole
from toolkit.plan.lower.piece import Piece


class Zero(Gradients):
    """All units of a model under ZeRO-1, or ZeRO-2 when `shard_gradients`."""

    def __init__(
        self,
        parameters: Named,
        paths: Sequence[str],
        group: dist.ProcessGroup,
        replicas: dist.ProcessGroup | None,
        *,
        shard_gradients: bool,
        put_off: bool = False,
    ) -> None:
        self.shard_gradients = shard_gradients
        self._flying: Unit | None = None
        self._replicas = replicas
        kept = [held for unit in units(parameters, paths).values() for held in by_dtype(unit)]
        num_ranks = dist.get_world_size(group)
        padded = [(-(-count // num_ranks) * num_ranks, dtype) for count, dtype in map(size, kept)]
        # Under ZeRO-2 whole gradients come and go, which the others could not follow.
        self._room: shared.Room | None = None
        if shard_gradients:
            flats = [
                torch.zeros(count, dtype=dtype, device=device(kept)) for count, dtype in padded
            ]
            wholes: list[Tensor | None] = [None] * len(kept)
        else:
            both, self._room = shared.buffers([*padded, *padded], device(kept), group)
            flats, wholes = both[: len(kept)], [*both[len(kept) :]]
        self.units = [
            Unit(held, flat, whole, group, replicas, self._before_launch, put_off=put_off)
            for held, flat, whole in zip(kept, flats, wholes, strict=True)
        ]

    @property
    def pieces(self) -> dict[str, nn.Parameter]:
        """What this rank updates: flat pieces of the parameters, by path."""
        return {name: piece for unit in self.units for name, piece in unit.pieces.items()}

    def zero(self) -> None:
        for unit in self.units:
            unit.zero()

    def arm(self, *, last: bool) -> None:
        if (last and self._room is None) or self.shard_gradients:
            for unit in self.units:
                unit.arm()

    def settle(self, *, last: bool) -> None:
        if last and self._room is not None:
            self._meet(self._room)
        elif last or self.shard_gradients:
            for unit in self.units:
                unit.finish(self.landed)
            self._flying = None

    def after_update(self) -> None:
        if self._room is not None:
            self._room.all_gather([unit.flat for unit in self.units])
            return
        for unit in self.units:
            unit.gather_parameters()

    def _meet(self, room: shared.Room) -> None:
        wholes = [unit.complete() for unit in self.units]
        room.reduce_scatter(wholes, [unit.gradient for unit in self.units])
        for unit in self.units:
            if self._replicas is not None:
                dist.all_reduce(unit.gradient, group=self._replicas)
            elif self.landed is not None:
                self.landed(None, unit.pieces.values())

    def _before_launch(self, unit: Unit) -> None:
        """ZeRO-2 keeps whole gradients of two units at most: one that is being reduced, and one
        that backward is filling.
        """
        if self.shard_gradients and self._flying is not None:
            self._flying.finish()
        self._flying = unit

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for unit in self.units:
            yield from unit.gradients()

    def saved(self, name: str, value: Tensor) -> Piece:
        return next(unit for unit in self.units if name in unit.pieces).saved(name, value)


class Unit:
    """Parameters that lie, and are reduced, as one buffer of n equal parts: `flat`.

    `whole` is as long a buffer for their gradients; under ZeRO-2, None.
    """

    def __init__(
        self,
        parameters: Named,
        flat: Tensor,
        whole: Tensor | None,
        group: dist.ProcessGroup,
        replicas: dist.ProcessGroup | None,
        before_launch: Callable[[Unit], None],
        *,
        put_off: bool,
    ) -> None:
        self.parameters = dict(parameters)
        self.group, self.replicas = group, replicas
        self.before_launch = before_launch
        self.shard_gradients, self.put_off = whole is None, put_off
        self.num_ranks = dist.get_world_size(group)
        sizes = [local(parameter).numel() for parameter in self.parameters.values()]
        self.part = flat.numel() // self.num_ranks
        self.begin = dist.get_rank(group) * self.part
        starts = list(itertools.accumulate(sizes, initial=0))[:-1]
        self.spans = {
            name: (start, start + size)
            for name, start, size in zip(self.parameters, starts, sizes, strict=True)
        }
        self.flat = flat
        self._empty = flat.new_empty(0)
        self.gradient = self._buffer(self.part)  # this rank's, complete after a step
        self._whole = whole  # gradients of the unit, while there are any
        self._left: set[str] = set()  # whose first gradient of a step is awaited
        self._arrived = self.gradient
        self._work: dist.Work | None = None
        self._armed, self._waiting = False, 0
        for name, parameter in self.parameters.items():
            view = self._view(self.flat, name)
            view.copy_(local(parameter).detach())
            relocate(parameter, view)
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._ready(name))
        self.pieces = {}
        for name, (start, end) in self.spans.items():
            a, b = max(start, self.begin), min(end, self.begin + self.part)
            if a < b:
                piece = nn.Parameter(self.flat[a:b])
                piece.grad = self.gradient[a - self.begin : b - self.begin]
                self.pieces[name] = piece
        if whole is not None:
            for name, parameter in self.parameters.items():
                parameter.grad = like(parameter, self._view(whole, name))

    def zero(self) -> None:
        if self.shard_gradients:
            self.gradient.zero_()
        elif self.put_off:
            assert self._whole is not None
            self._whole.zero_()
        else:
            self._left = set(self.parameters)
            for parameter in self.parameters.values():
                parameter.grad = None

    def arm(self) -> None:
        """Reduce in the backward that follows."""
        self._armed, self._waiting = True, len(self.parameters)

    def finish(self, landed: Landed | None = None) -> None:
        """Wait for the reduction; start it first if some parameter took no part in the loss."""
        if not self._armed:
            return  # finished already
        if self._work is None:
            self._launch()
        assert self._work is not None
        if landed is not None and self.replicas is None and not self.shard_gradients:
            landed(self._work, self.pieces.values())
        self._work.wait()
        if self.replicas is not None:
            dist.all_reduce(self._arrived, group=self.replicas)
        if self.shard_gradients:
            self.gradient += self._arrived
            self._arrived, self._whole = self._empty, None
        self._work, self._armed = None, False

    def gather_parameters(self) -> None:
        """Give every rank what each has updated."""
        own = self.flat[self.begin : self.begin + self.part].clone()
        dist.all_gather_single(self.flat, own, group=self.group)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (path, whole gradient). All ranks must run through it."""
        flat = self._buffer()
        dist.all_gather_single(flat, self.gradient, group=self.group)
        for name, parameter in self.parameters.items():
            yield name, whole(like(parameter, self._view(flat, name)))

    def saved(self, name: str, value: Tensor) -> Piece:
        """Return what `value`, the part of `name` in this rank's piece, is a part of."""
        parameter = self.parameters[name]
        origin = _origin(parameter)
        start = max(self.spans[name][0], self.begin) - self.spans[name][0]
        return Piece(value, tuple(parameter.shape), tuple(local(parameter).shape), origin, start)

    def _ready(self, name: str) -> None:
        if self.shard_gradients:
            # Freed one by one as they come: what lies in the buffer is the whole unit's gradient.
            parameter = self.parameters[name]
            if self._whole is None:
                self._whole = self._buffer()
            assert parameter.grad is not None
            self._view(self._whole, name).copy_(local(parameter.grad))
            parameter.grad = None
        elif name in self._left:
            self._take(name)
        if self._armed:
            self._waiting -= 1
            if self._waiting == 0:
                self._launch()

    def complete(self) -> Tensor:
        """Take what no backward of this step gave; return the whole gradient."""
        if self._whole is None:  # none of the unit took part in the loss
            self._whole = self._buffer()
        for name in tuple(self._left):
            self._take(name)
        return self._whole

    def _launch(self) -> None:
        self.before_launch(self)
        whole = self.complete()
        if self.shard_gradients:
            self._arrived = self._buffer(self.part)
        self._work = dist.reduce_scatter_single(
            self._arrived, whole, group=self.group, async_op=True
        )

    def _take(self, name: str) -> None:
        assert self._whole is not None
        self._left.remove(name)
        take(self.parameters[name], self._view(self._whole, name))

    def _buffer(self, size: int | None = None) -> Tensor:
        return self._empty.new_zeros(self.part * self.num_ranks if size is None else size)

    def _view(self, flat: Tensor, name: str) -> Tensor:
        start, end = self.spans[name]
        return flat[start:end].view_as(local(self.parameters[name]))


def _origin(parameter: nn.Parameter) -> tuple[int, ...]:
    """Where this rank's part of a parameter begins in the whole one."""
    if not isinstance(parameter, DTensor):
        return (0,) * parameter.dim()
    origin = [0] * parameter.dim()
    for axis, placement in enumerate(parameter.placements):
        dim = getattr(placement, "dim", None)
        if dim is not None:
            origin[dim] += parameter.device_mesh.get_local_rank(axis) * local(parameter).shape[dim]
    return tuple(origin)
