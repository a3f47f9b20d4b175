"""The replica and data axes: how the gradients of ranks that saw different samples meet.

`Buckets` is data parallelism; lower/zero.py holds ZeRO-1 and 2; FSDP2 is torch's own. What is
reduced together is a unit: the parameters in a module, less those of units inside it. Ranks that
share a machine's CPUs meet after the last backward, in memory (shared.py); others in it, as soon
as a unit is complete.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from toolkit.plan.lower import shared
from toolkit.plan.lower.lowered import Landed, whole

# Parameters by their path in the whole model.
Named = Mapping[str, nn.Parameter]


class Gradients(ABC):
    """What a step calls, in this order: `zero`, then `arm` and `settle` around each backward.

    The loss has been divided by the microbatches and the ranks, so that sums are means.
    """

    landed: Landed | None = None  # called with what is reduced once, before it is waited for

    @abstractmethod
    def zero(self) -> None:
        """Forget the gradients of the last step."""

    @abstractmethod
    def arm(self, *, last: bool) -> None:
        """A backward follows; `last` is the one that completes the gradients."""

    @abstractmethod
    def settle(self, *, last: bool) -> None:
        """That backward is over: wait for what it started."""


def units(parameters: Named, paths: Sequence[str]) -> dict[str, dict[str, nn.Parameter]]:
    """Return each unit's trained parameters, innermost units first: the order backward fills them.

    >>> weight = nn.Parameter(torch.zeros(1))
    >>> found = units({"a.w": weight, "b.w": weight}, ["", "a"])
    >>> {path: list(held) for path, held in found.items()}
    {'a': ['a.w'], '': ['b.w']}
    """
    inner_first = sorted(paths, key=len, reverse=True)
    found: dict[str, dict[str, nn.Parameter]] = {path: {} for path in inner_first}
    for name, parameter in parameters.items():
        held = (path for path in inner_first if not path or name.startswith(f"{path}."))
        unit = next(held, None)
        if unit is not None and parameter.requires_grad:
            found[unit][name] = parameter
    return found


def by_dtype(parameters: Named) -> Iterator[dict[str, nn.Parameter]]:
    """Yield the parameters of each dtype: they can share a buffer."""
    found: dict[torch.dtype, dict[str, nn.Parameter]] = {}
    for name, parameter in parameters.items():
        found.setdefault(parameter.dtype, {})[name] = parameter
    yield from found.values()


def local(value: Tensor) -> Tensor:
    """Return this rank's part of a tensor that is split over the tensor axis, or all of it."""
    if not isinstance(value, DTensor):
        return value
    with torch.no_grad():
        return value.to_local()


def like(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """Return `part`, this rank's, as a tensor that lies as `parameter` does."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements,
        run_check=False, shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


def take(parameter: nn.Parameter, piece: Tensor) -> None:
    """Copy the first gradient of a step into its `piece` of a buffer; others are added there.

    Autograd hands over what it made, so this costs half of adding to a buffer of zeros.
    """
    found = parameter.grad
    if found is None:
        piece.zero_()
    else:
        if isinstance(found, DTensor) and isinstance(parameter, DTensor):
            found = found.redistribute(placements=parameter.placements)  # type: ignore[no-untyped-call]
        piece.copy_(local(found))
    parameter.grad = like(parameter, piece)


class Buckets(Gradients):
    """Data parallel: every rank holds the model, and each unit's gradients are all-reduced once.

    Where weights' gradients are `put_off`, they are added to the buffers, without autograd's hooks.
    """

    def __init__(
        self,
        parameters: Named,
        paths: Sequence[str],
        group: dist.ProcessGroup,
        *,
        put_off: bool = False,
    ) -> None:
        kept = [held for unit in units(parameters, paths).values() for held in by_dtype(unit)]
        flats, self._room = shared.buffers([size(held) for held in kept], device(kept), group)
        self.buckets = [
            Bucket(held, flat, group, put_off=put_off)
            for held, flat in zip(kept, flats, strict=True)
        ]

    def zero(self) -> None:
        for bucket in self.buckets:
            bucket.zero()

    def arm(self, *, last: bool) -> None:
        if last and self._room is None:
            for bucket in self.buckets:
                bucket.arm()

    def settle(self, *, last: bool) -> None:
        if not last:
            return
        if self._room is None:
            for bucket in self.buckets:
                bucket.finish(self.landed)
            return
        for bucket in self.buckets:
            bucket.complete()
        self._room.all_reduce([bucket.flat for bucket in self.buckets])
        if self.landed is not None:
            for bucket in self.buckets:
                self.landed(None, bucket.parameters)


class Bucket:
    """Parameters whose gradients lie in one buffer, `flat`, and are all-reduced as one.

    Each parameter's gradient becomes a view of the buffer. Once armed, the reduction starts as soon
    as the last gradient of the bucket is there, while backward goes on (Li et al. 2020).
    """

    def __init__(
        self, parameters: Named, flat: Tensor, group: dist.ProcessGroup, *, put_off: bool
    ) -> None:
        self.parameters = tuple(parameters.values())
        self.group = group
        self.put_off = put_off
        self.armed = False
        self._waiting = 0
        self._work: dist.Work | None = None
        sizes = [local(parameter).numel() for parameter in self.parameters]
        self.flat = flat
        self._left: dict[
            int, Tensor
        ] = {}  # pieces of the buffer that await a step's first gradient
        self._pieces = {
            id(parameter): piece.view_as(local(parameter))
            for parameter, piece in zip(self.parameters, self.flat.split(sizes), strict=True)
        }
        for parameter in self.parameters:
            parameter.grad = like(parameter, self._pieces[id(parameter)])
            parameter.register_post_accumulate_grad_hook(self._ready)

    def zero(self) -> None:
        if self.put_off:
            self.flat.zero_()
            return
        self._left = dict(self._pieces)
        for parameter in self.parameters:
            parameter.grad = None

    def arm(self) -> None:
        """Reduce in the backward that follows: it is the last one of the step."""
        self.armed = True
        self._waiting = len(self.parameters)

    def _ready(self, parameter: Tensor) -> None:
        piece = self._left.pop(id(parameter), None)
        if piece is not None:
            take(cast("nn.Parameter", parameter), piece)
        if self.armed:
            self._waiting -= 1
            if self._waiting == 0:
                self._launch()

    def complete(self) -> None:
        """Take what no backward of this step gave."""
        for parameter in self.parameters if self._left else ():
            if id(parameter) in self._left:
                take(parameter, self._left.pop(id(parameter)))

    def _launch(self) -> None:
        self.complete()
        self._work = dist.all_reduce(self.flat, group=self.group, async_op=True)

    def finish(self, landed: Landed | None) -> None:
        """Wait for the reduction; start it first if some parameter took no part in the loss."""
        if self._work is None:
            self._launch()
        assert self._work is not None
        if landed is not None:
            landed(self._work, self.parameters)
        self._work.wait()
        self._work, self.armed = None, False


def size(parameters: Named) -> tuple[int, torch.dtype]:
    """Return the elements, and their type, of this rank's parts of parameters of one type."""
    found = [local(parameter) for parameter in parameters.values()]
    return sum(part.numel() for part in found), found[0].dtype


def device(kept: Sequence[Named]) -> torch.device:
    """Return where parameters lie."""
    first = next((parameter for held in kept for parameter in held.values()), None)
    return torch.device("cpu") if first is None else local(first).device


def gathered(parameters: Named) -> Iterator[tuple[str, Tensor]]:
    """Yield (path, whole gradient) of trained parameters. All ranks must run through it."""
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            yield name, whole(found)
