"""Parity: what a plan computes against what one device computes, loss and every gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from toolkit.errors import UsageError
from toolkit.plan import runtime
from toolkit.plan.lower.lowered import Batch, Lowered, loss_of
from toolkit.plan.plan import Plan
from toolkit.plan.runtime import Session

TOLERANCE: Mapping[str, float] = {"float32": 1e-5, "float64": 1e-10}

# Some gradients are zero in exact arithmetic (an attention's key bias) and rounding noise in
# floats: an error is taken relative to the gradient's norm, but at least to this part of the
# norm of all gradients together.
_FLOOR = 1e-3
_TINY = 1e-30


@dataclass(frozen=True)
class Parity:
    """Errors relative to one device: of the loss, and the largest over all gradients."""

    loss: float
    reference_loss: float
    loss_error: float
    gradient_error: float
    worst_gradient: str
    num_gradients: int
    missing: tuple[str, ...]
    tolerance: float

    @property
    def holds(self) -> bool:
        return (
            not self.missing
            and self.loss_error <= self.tolerance
            and self.gradient_error <= self.tolerance
        )


@dataclass(frozen=True)
class Reference:
    """What one device computes: the mean loss, and the gradient of every trained parameter."""

    loss: float
    gradients: Mapping[str, Tensor]


def tolerance(dtype: str) -> float:
    """Return the relative error allowed in `dtype`; UsageError where agreement says nothing."""
    if dtype not in TOLERANCE:
        raise UsageError(
            f"parity with one device is checked in {' or '.join(TOLERANCE)}, not in {dtype}",
            remedy="use `toolkit plan verify`, which runs the plan in float32",
        )
    return TOLERANCE[dtype]


def reference(module: nn.Module, batch: Batch) -> Reference:
    """Run `module` on one device; its gradients are cleared again."""
    loss = loss_of(module(**batch))
    loss.backward()
    found = {
        name: parameter.grad
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    module.zero_grad(set_to_none=True)
    return Reference(float(loss.detach()), found)


def one_device(plan: Plan, here: Session, lowered: Lowered, batch: Batch) -> Reference:
    """Run the run's present weights on one device. All ranks must call this."""
    module = runtime.build(plan, here)
    held = dict(lowered.whole_parameters())
    gathered: list[list[str]] = [[] for _ in range(here.num_ranks)]
    dist.all_gather_object(gathered, list(held))
    for name, parameter in module.named_parameters():
        owner = next(rank for rank, names in enumerate(gathered) if name in names)
        with torch.no_grad():
            if here.rank == owner:
                parameter.copy_(held[name])
            dist.broadcast(parameter, src=owner)
    return reference(module, batch)


def error(got: Tensor, want: Tensor, whole_norm: float) -> float:
    """Return ||got - want|| / max(||want||, 1e-3 of the norm of all gradients); inf if not finite.

    >>> error(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), 1.0)
    0.0
    """
    scale = max(float(want.norm()), _FLOOR * whole_norm)
    found = float((got - want).norm()) / scale if scale else float(got.norm())
    return found if math.isfinite(found) else math.inf


def compare(lowered: Lowered, loss: Tensor | None, want: Reference) -> Parity:
    """Compare the step just run with the reference. All ranks must call this; all get the result.

    Every gradient of the reference must be held, whole, by at least one rank.
    """
    got_loss = lowered.global_loss(loss)
    norm = math.sqrt(sum(float(gradient.norm()) ** 2 for gradient in want.gradients.values()))
    errors = {
        name: error(gradient, want.gradients[name], norm)
        for name, gradient in lowered.gradients()
        if name in want.gradients
    }
    gathered: list[dict[str, float]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, errors)
    worst = {
        name: max(found[name] for found in gathered if name in found)
        for name in want.gradients
        if any(name in found for found in gathered)
    }
    name = max(worst, key=lambda key: worst[key])
    dtype = str(next(iter(want.gradients.values())).dtype).removeprefix("torch.")
    return Parity(
        loss=got_loss,
        reference_loss=want.loss,
        loss_error=abs(got_loss - want.loss) / max(abs(want.loss), _TINY),
        gradient_error=worst[name],
        worst_gradient=name,
        num_gradients=len(worst),
        missing=tuple(sorted(set(want.gradients) - set(worst))),
        tolerance=tolerance(dtype),
    )
