"""Rung 1 of the ladder: every rank runs the whole model's program on its part of the batch.

The axes compose. Over `tensor`, Linears are split (tensor.py). Over `data` and `replica` the
batch is divided, and each unit's parameters are replicated (data.py), sharded for the update
(zero.py), or sharded throughout (FSDP2; with a replica axis, its hybrid sharding; with parameters
offloaded, its CPUOffloadPolicy, which has never run on a GPU from here).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from toolkit.errors import UsageError
from toolkit.plan.lower import groups, tensor
from toolkit.plan.lower.data import Buckets, Gradients
from toolkit.plan.lower.lowered import Batch, Landed, Lowered, loss_of
from toolkit.plan.lower.recorder import Recorder
from toolkit.plan.lower.zero import Zero
from toolkit.plan.plan import DATA_WAYS, How, Plan

_AXES = ("pipeline", "replica", "data", "tensor")
_RUNGS: dict[How, str] = {
    "replicate": "all-reduce buckets",
    "shard_optimizer": "ZeRO-1 buckets",
    "shard_gradients": "ZeRO-2 buckets",
    "shard": "fully_shard (FSDP2)",
}


class Native(Lowered):
    """See the head of this file."""

    def __init__(self, plan: Plan, module: nn.Module, mesh: DeviceMesh, recorder: Recorder) -> None:
        super().__init__(plan, recorder)
        self.module = module
        self._tensor = tensor.split(plan, module, mesh) if plan.size("tensor") > 1 else None
        for path in plan.recompute:
            _recompute(module.get_submodule(path))
        way = check_ways(plan)
        self._sharded: tuple[FSDPModule, ...] = ()
        if way == "shard":
            self._sharded = _fully_shard(plan, module, mesh)
        self.parameters = dict(module.named_parameters())
        self._gradients: Gradients | None = None
        if way in ("shard_optimizer", "shard_gradients"):
            self._gradients = Zero(
                self.parameters,
                _on_data(plan, way),
                mesh.get_group("data"),
                mesh.get_group("replica") if plan.size("replica") > 1 else None,
                shard_gradients=way == "shard_gradients",
            )
        elif way == "replicate":
            group = groups.along(plan, ("replica", "data"), mesh)
            self._gradients = Buckets(self.parameters, _on_data(plan, way), group)
        rungs = [*([self._tensor.rung] if self._tensor else []), *([_RUNGS[way]] if way else [])]
        if plan.offload == "parameters":
            rungs.append("CPUOffloadPolicy")
        self.rung = f"native: {' + '.join(rungs) or 'one device'}"

    def step(self, batch: Batch) -> Tensor:
        part = self._part(batch)
        pieces = [
            dict(zip(part, values, strict=True))
            for values in zip(
                *(value.split(self.plan.microbatch) for value in part.values()), strict=True
            )
        ]
        # FSDP2 takes the mean over ranks; what is written here takes sums.
        divisor = self.plan.microbatches * (1 if self._sharded else self.plan.num_replicas)
        row = self.plan.order[0]
        last_backward = max(i for i, action in enumerate(row) if action.kind == "B")
        losses: dict[int, Tensor] = {}
        for i, action in enumerate(row):
            last = i == last_backward
            with self.recorder.action(action):
                if action.kind == "F":
                    losses[action.microbatch] = loss_of(self.module(**pieces[action.microbatch]))
                    continue
                self._arm(last=last)
                loss = losses[action.microbatch]
                losses[action.microbatch] = loss.detach()
                (loss / divisor).backward()
                del loss  # or the graph would outlive its backward
            if self._gradients:
                with self.recorder.span("wait for gradients", "communication"):
                    self._gradients.settle(last=last)
        if self._tensor:
            self._tensor.finish(self.parameters)
        return torch.stack([*losses.values()]).mean()

    def global_loss(self, loss: Tensor | None) -> float:
        assert loss is not None
        total = loss.double()
        dist.all_reduce(total)
        return float(total) / dist.get_world_size()

    def zero_gradients(self) -> None:
        if self._gradients:
            self._gradients.zero()
        else:
            super().zero_gradients()

    def optimizer_parameters(self) -> dict[str, nn.Parameter]:
        if isinstance(self._gradients, Zero):
            return self._gradients.pieces
        return super().optimizer_parameters()

    def after_update(self) -> None:
        if isinstance(self._gradients, Zero):
            with self.recorder.span("gather parameters", "all_gather"):
                self._gradients.after_update()

    def lands(self, landed: Landed) -> None:
        if self.plan.placed("sequence"):
            return  # what saw a part of the tokens is added up after it was reduced
        if self._gradients:
            self._gradients.landed = landed
        elif self._sharded:
            # FSDP2 calls these hooks where it has reduced a gradient, once a step.
            for parameter in super().optimizer_parameters().values():
                parameter.register_post_accumulate_grad_hook(lambda one: landed(None, [one]))

    def saved(self, name: str, value: Tensor) -> Any:
        if isinstance(self._gradients, Zero):
            return self._gradients.saved(name, value)
        return value

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        if isinstance(self._gradients, Zero):
            return self._gradients.gradients()
        return super().gradients()

    def _arm(self, *, last: bool) -> None:
        if self._gradients:
            self._gradients.arm(last=last)
        for unit in self._sharded:
            unit.set_requires_gradient_sync(last)

    def _part(self, batch: Batch) -> dict[str, Tensor]:
        """The samples of this rank."""
        place = groups.replica(self.plan, dist.get_rank())
        size = self.plan.rank_batch
        return {name: value[place * size : (place + 1) * size] for name, value in batch.items()}


def lower(
    plan: Plan, module: nn.Module, mesh: DeviceMesh, recorder: Recorder, example: Batch
) -> Lowered:
    """Return what this rank runs of `plan`. `module` is the whole model with equal weights on
    every rank. Raises UsageError for a plan this rung cannot express.
    """
    foreign = [axis.name for axis in plan.mesh if axis.size > 1 and axis.name not in _AXES]
    if foreign or plan.splits or len(plan.stages) > 1:
        raise UsageError(
            f"the native rung runs no {', '.join(foreign) or 'splits of operators or stages'}",
            remedy="lower it through toolkit.plan.lower.ladder, which picks the rung",
        )
    return Native(plan, module, mesh, recorder)


def check_ways(plan: Plan) -> How | None:
    """Return how parameters lie over the data axis, every unit alike; UsageError for what this
    rung does not run.
    """
    ways: list[How] = [how for how in DATA_WAYS if _on_data(plan, how)]
    if len(ways) > 1:
        raise UsageError(
            f"units lie over the data axis as {' and '.join(ways)}, and this rung takes one way",
            remedy=f"place every unit as {ways[-1]}",
        )
    if not ways and plan.num_replicas > 1:
        raise UsageError(
            f"{plan.num_replicas} replicas train, and no module says how its gradients meet",
            remedy=f"place modules on the data axis: {', '.join(DATA_WAYS)}",
        )
    if plan.placed("sequence") and ways and ways[0] in ("shard_optimizer", "shard_gradients"):
        raise UsageError(
            f"{ways[0]} does not run with activations split by tokens: gradients of what saw a "
            "part of the tokens would be reduced before they are whole",
            remedy="place units as replicate or shard, or nothing as sequence",
        )
    return ways[0] if ways else None


def _on_data(plan: Plan, how: How) -> tuple[str, ...]:
    return tuple(
        entry.module for entry in plan.placements if (entry.axis, entry.how) == ("data", how)
    )


def _fully_shard(plan: Plan, module: nn.Module, mesh: DeviceMesh) -> tuple[FSDPModule, ...]:
    """Shard every unit, inner ones first; over replica x data it is hybrid sharding."""
    names = ("replica", "data") if plan.size("replica") > 1 else ("data",)
    over = mesh[names] if len(plan.mesh) > len(names) else mesh
    policy = OffloadPolicy()
    if plan.offload == "parameters":
        policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    found = []
    for path in sorted(_on_data(plan, "shard"), key=len, reverse=True):
        unit = fully_shard(module.get_submodule(path), mesh=over, offload_policy=policy)
        assert isinstance(unit, FSDPModule)
        found.append(unit)
    return tuple(found)


def _recompute(block: nn.Module) -> None:
    forward = block.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    block.forward = recomputed  # type: ignore[method-assign]
