"""Rung 1 of the ladder: plans that FSDP2, DTensor and torch's pipelining express as they are.

`lower(plan, ...)` gives a `Lowered`: what one rank holds and runs. All of them take the *global*
batch and pick their own part of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from toolkit.errors import UsageError
from toolkit.plan.lower import data, pipeline, stages, tensor
from toolkit.plan.lower.recorder import Recorder
from toolkit.plan.order import simple
from toolkit.plan.plan import Plan

# One batch by input name; the samples lie along dim 0.
Batch = Mapping[str, Tensor]


class Lowered(ABC):
    """What one rank holds and runs.

    `parameters` go by their path in the whole model; a split one is a DTensor.
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

    def whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (path, whole parameter) of what this rank holds. All ranks must run through it."""
        for name, parameter in self.parameters.items():
            yield name, _whole(parameter.detach())

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (path, whole gradient) of what this rank holds. All ranks must run through it."""
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                yield name, _whole(found)


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


class Pipeline(Lowered):
    rung = "native: torch.distributed.pipelining.Schedule1F1B"

    def __init__(
        self,
        plan: Plan,
        module: nn.Module,
        mesh: DeviceMesh,
        recorder: Recorder,
        example: Batch,
    ) -> None:
        super().__init__(plan, recorder)
        if plan.order != simple.one_f_one_b(len(plan.stages), plan.microbatches).rows:
            raise UsageError(
                "only the 1F1B order is lowered so far; this plan's order table differs",
                remedy="make the plan again with --strategy 1f1b",
            )
        self.group = mesh.get_group("pipeline")
        self.index = mesh.get_local_rank("pipeline")
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        cuts = stages.cut(module, example, [stage.begins_at for stage in plan.stages])
        self.user_inputs = cuts[self.index].user_inputs
        self.stage = pipeline.stage(
            cuts,
            self.index,
            batch=example,
            device=next(module.parameters()).device,
            group=self.group,
            recompute=bool(plan.recompute),
            recorder=recorder,
        )
        held = cuts[self.index].module.parameters()
        self.parameters = {names[id(parameter)]: parameter for parameter in held}
        self.shared = {
            # Every rank makes every group, in the same order, whether it is a member or not.
            name: dist.new_group([dist.get_global_rank(self.group, stage) for stage in holders])
            for name, holders in pipeline.shared_parameters(cuts, names).items()
        }
        self.schedule = Schedule1F1B(self.stage, plan.microbatches, loss_fn=lambda loss, _: loss)

    def step(self, batch: Batch) -> Tensor | None:
        own: dict[str, Any] = {name: batch[name] for name in self.user_inputs}
        first, last = self.stage.is_first, self.stage.is_last
        losses: list[Tensor] = []
        self.schedule.step(
            *(own.values() if first else ()),
            **({} if first else own),
            # The last stage's graph ends in the loss; torch's schedule still asks for a target.
            target=torch.zeros(self.plan.microbatches) if last else None,
            losses=losses if last else None,
            return_outputs=False,
        )
        for name, group in self.shared.items():
            if name in self.parameters:
                with self.recorder.span(f"sum {name}", "all_reduce"):
                    dist.all_reduce(self.parameters[name].grad, group=group)
        return pipeline.mean(losses) if last else None

    def global_loss(self, loss: Tensor | None) -> float:
        last = len(self.plan.stages) - 1
        # The loss has one type on all ranks, whatever the model's: the widest.
        total = torch.zeros((), dtype=torch.float64, device=self.stage.device)
        if loss is not None:
            total += loss.double()
        dist.broadcast(total, dist.get_global_rank(self.group, last), group=self.group)
        return float(total)


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


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _names(mesh: DeviceMesh) -> tuple[str, ...]:
    return mesh.mesh_dim_names or ()
