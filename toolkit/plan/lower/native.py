"""Rung 1 of the ladder: plans that FSDP2, DTensor and torch's pipelining express as they are.

`lower(plan, ...)` gives a `Lowered`: what one rank holds and runs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint

from toolkit.errors import UsageError
from toolkit.plan.lower import data, tensor
from toolkit.plan.lower.lowered import Batch, Lowered, loss_of
from toolkit.plan.lower.pipeline import Pipeline
from toolkit.plan.lower.recorder import Recorder
from toolkit.plan.plan import Plan


class _Spmd(Lowered):
    """Every rank runs the whole model's program on its part of the batch."""

    def __init__(self, plan: Plan, module: nn.Module, mesh: DeviceMesh, recorder: Recorder) -> None:
        super().__init__(plan, recorder)
        self.module = module
        self.mesh = mesh
        self.parameters = dict(module.named_parameters())

    def step(self, batch: Batch) -> Tensor:
        part = self._part(batch)
        pieces = [
            dict(zip(part, values, strict=True))
            for values in zip(
                *(value.split(self.plan.microbatch) for value in part.values()), strict=True
            )
        ]
        losses: list[Tensor] = []
        loss: Tensor | None = None
        for action in self.plan.order[0]:
            with self.recorder.action(action):
                if action.kind == "F":
                    loss = loss_of(self.module(**pieces[action.microbatch]))
                    losses.append(loss.detach())
                else:
                    assert loss is not None
                    self._before_backward(last=action.microbatch + 1 == self.plan.microbatches)
                    (loss / self._divisor).backward()
        self._finish()
        return torch.stack(losses).mean()

    @property
    def _divisor(self) -> int:
        return self.plan.microbatches

    def _part(self, batch: Batch) -> dict[str, Tensor]:
        """The samples of this rank."""
        rank = self.mesh.get_local_rank("data") if "data" in _names(self.mesh) else 0
        size = self.plan.rank_batch
        return {name: value[rank * size : (rank + 1) * size] for name, value in batch.items()}

    def global_loss(self, loss: Tensor | None) -> float:
        assert loss is not None
        total = loss.clone()
        if "data" in _names(self.mesh):
            dist.all_reduce(total, group=self.mesh.get_group("data"))
            total /= self.mesh.size()
        return float(total)

    def _before_backward(self, *, last: bool) -> None:
        """Called before each backward; `last` is the one that completes the gradients."""

    def _finish(self) -> None:
        """Called after the last backward."""


class DataParallel(_Spmd):
    rung = "native: all-reduce buckets over torch.distributed"

    def __init__(self, plan: Plan, module: nn.Module, mesh: DeviceMesh, recorder: Recorder) -> None:
        super().__init__(plan, module, mesh, recorder)
        self.buckets = data.buckets(module, plan.placed("replicate"), mesh.get_group("data"))

    @property
    def _divisor(self) -> int:
        # The buckets are summed over ranks; dividing the loss makes the sum the mean.
        return self.plan.microbatches * self.plan.size("data")

    def zero_gradients(self) -> None:
        for bucket in self.buckets:
            bucket.zero()

    def _before_backward(self, *, last: bool) -> None:
        if last:
            for bucket in self.buckets:
                bucket.arm()

    def _finish(self) -> None:
        with self.recorder.span("wait for gradients", "all_reduce"):
            for bucket in self.buckets:
                bucket.finish()


class FullyShard(_Spmd):
    rung = "native: torch.distributed.fsdp.fully_shard (FSDP2)"

    def __init__(self, plan: Plan, module: nn.Module, mesh: DeviceMesh, recorder: Recorder) -> None:
        for path in plan.placed("shard"):
            fully_shard(module.get_submodule(path), mesh=mesh)
        super().__init__(plan, module, mesh, recorder)

    def _before_backward(self, *, last: bool) -> None:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(last)


class TensorParallel(_Spmd):
    rung = "native: torch.distributed.tensor.parallel (DTensor)"

    def __init__(self, plan: Plan, module: nn.Module, mesh: DeviceMesh, recorder: Recorder) -> None:
        self._shared = tensor.split(module, mesh, plan.placed("column"), plan.placed("row"))
        super().__init__(plan, module, mesh, recorder)

    def _finish(self) -> None:
        self._shared.forget()


def lower(
    plan: Plan, module: nn.Module, mesh: DeviceMesh, recorder: Recorder, example: Batch
) -> Lowered:
    """Return what this rank runs of `plan`. `module` is the whole model with equal weights on
    every rank; `example` is one microbatch. Raises UsageError for a plan this rung cannot express.
    """
    axes = tuple(axis.name for axis in plan.mesh)
    ways = {how for how in ("replicate", "shard", "column", "row") if plan.placed(how)}
    if axes != ("pipeline",):
        for path in plan.recompute:
            _recompute(module.get_submodule(path))
    if axes == ("data",) and ways == {"replicate"}:
        return DataParallel(plan, module, mesh, recorder)
    if axes == ("data",) and ways == {"shard"}:
        return FullyShard(plan, module, mesh, recorder)
    if axes == ("tensor",) and ways == {"column", "row"}:
        return TensorParallel(plan, module, mesh, recorder)
    if axes == ("pipeline",) and not ways:
        return Pipeline(plan, module, mesh, recorder, example)
    raise UsageError(
        f"no rung of the ladder runs a mesh of {', '.join(axes)} with placements "
        f"{', '.join(sorted(ways)) or 'none'} yet",
        remedy="use one strategy over one mesh axis: dp, fsdp, tp or 1f1b",
    )


def _recompute(block: nn.Module) -> None:
    forward = block.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    block.forward = recomputed  # type: ignore[method-assign]


def _names(mesh: DeviceMesh) -> tuple[str, ...]:
    return mesh.mesh_dim_names or ()
