"""What one rank holds and runs, whichever rung of the ladder made it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from toolkit.errors import UsageError
from toolkit.plan.lower.recorder import Recorder
from toolkit.plan.plan import Plan

# One batch by input name; the samples lie along dim 0.
Batch = Mapping[str, Tensor]
# Told of parameters whose gradients are final: after a reduction under way, or after what is queued
# already (None).
Landed = Callable[["dist.Work | None", Iterable[nn.Parameter]], None]


class Lowered(ABC):
    """What one rank holds and runs. All rungs take the *global* batch and pick their own part.

    `rung` says how it is run ("native: ...", "schedule: ...", "program: ..."). `parameters` go by
    their path in the whole model; a split one is a DTensor.

    One training step is `zero_gradients`, `step`, an optimizer's step over
    `optimizer_parameters()`, and `after_update`. A prediction's traffic is that of `step` alone.
    """

    rung: str
    parameters: dict[str, nn.Parameter]

    def __init__(self, plan: Plan, recorder: Recorder) -> None:
        self.plan = plan
        self.recorder = recorder

    @abstractmethod
    def step(self, batch: Batch) -> Tensor | None:
        """Run forward and backward of one global batch; gradients are complete afterwards.

        Returns the mean loss of the samples this rank saw, or None when it saw no loss.
        """

    @abstractmethod
    def global_loss(self, loss: Tensor | None) -> float:
        """Return the mean loss of the global batch on every rank. All ranks must call this."""

    def zero_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def optimizer_parameters(self) -> dict[str, nn.Parameter]:
        """Return what this rank's optimizer updates, by path; their gradients are there after
        `step`. Under ZeRO-1 and 2 these are flat pieces of the parameters, with the optimizer on
        the host copies there, else the trained ones themselves.
        """
        return {
            name: parameter
            for name, parameter in self.parameters.items()
            if parameter.requires_grad
        }

    def after_update(self) -> None:  # noqa: B027 (most rungs have nothing to do)
        """Make `parameters` whole again after the optimizer's step. All ranks must call this."""

    def lands(self, landed: Landed) -> None:  # noqa: B027 (most rungs do not know)
        """Have `landed` called for gradients as soon as the step has reduced them."""

    def restored(self) -> None:  # noqa: B027 (most rungs have no copies)
        """`parameters` were written from outside, as from a checkpoint."""

    def saved(self, name: str, value: Tensor) -> Any:
        """Return `value`, which lies as `optimizer_parameters()[name]` does, as a checkpoint keeps
        it: something that knows which part of the whole tensor it is.
        """
        return value

    def whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (path, whole parameter) of what this rank holds. All ranks must run through it."""
        for name, parameter in self.parameters.items():
            yield name, whole(parameter.detach())

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (path, whole gradient) of what this rank holds. All ranks must run through it."""
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                yield name, whole(found)


def loss_of(output: Any) -> Tensor:
    """Return the scalar loss a model returned: itself, or a transformers output's `loss`.

    Raises UsageError when the model returned none.
    """
    found = getattr(output, "loss", output)
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise UsageError(
            f"the model returned {type(output).__name__}, not a scalar loss",
            remedy="plan a model whose forward takes its targets and returns the mean loss",
        )
    return found


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a split tensor. All ranks must call this together."""
    if not isinstance(tensor, DTensor):
        return tensor
    # Shards on the host are gathered by the devices.
    shards = tensor.to(tensor.device_mesh.device_type)
    assert isinstance(shards, DTensor)
    return shards.full_tensor()
