"""Data parallel: every rank holds the model; gradients are summed in buckets during backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn


class Bucket:
    """Parameters whose gradients lie in one buffer and are all-reduced as one.

    Each parameter's gradient is a view of the buffer, so nothing is copied. The reduction starts
    as soon as the last gradient of the bucket is there, while backward goes on (Li et al. 2020).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
        self.parameters = tuple(parameters)
        self.group = group
        self.armed = False
        self._waiting = 0
        self._work: dist.Work | None = None
        first = self.parameters[0]
        self.flat = torch.zeros(
            sum(parameter.numel() for parameter in self.parameters),
            dtype=first.dtype,
            device=first.device,
        )
        sizes = [parameter.numel() for parameter in self.parameters]
        for parameter, piece in zip(self.parameters, self.flat.split(sizes), strict=True):
            parameter.grad = piece.view_as(parameter)
            parameter.register_post_accumulate_grad_hook(self._ready)

    def zero(self) -> None:
        self.flat.zero_()

    def arm(self) -> None:
        """Reduce in the backward that follows: it is the last one of the step."""
        self.armed = True
        self._waiting = len(self.parameters)

    def _ready(self, _: torch.Tensor) -> None:
        if self.armed:
            self._waiting -= 1
            if self._waiting == 0:
                self._launch()

    def _launch(self) -> None:
        self._work = dist.all_reduce(self.flat, group=self.group, async_op=True)

    def finish(self) -> None:
        """Wait for the reduction; start it first if some parameter took no part in the loss."""
        if self._work is None:
            self._launch()
        assert self._work is not None
        self._work.wait()
        self._work, self.armed = None, False


def buckets(module: nn.Module, units: Sequence[str], group: dist.ProcessGroup) -> list[Bucket]:
    """Return one bucket per unit (a module path) and dtype, in the order backward fills them.

    A unit's bucket holds its parameters less those of units inside it.
    """
    taken: set[nn.Parameter] = set()
    found: list[Bucket] = []
    for path in sorted(units, key=_depth, reverse=True):
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in module.get_submodule(path).parameters():
            if parameter.requires_grad and parameter not in taken:
                taken.add(parameter)
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
        found += [Bucket(parameters, group) for parameters in by_dtype.values()]
    return found


def _depth(path: str) -> int:
    return path.count(".") + bool(path)
