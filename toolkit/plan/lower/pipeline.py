"""Rung 2 of the ladder: stages of a pipeline under torch's pipeline runtime and the plan's table.

Every stage lies on one position; a position may hold several (interleaved, V-shaped). Beside the
pipeline axis the mesh may have replica and data axes, over which each stage's gradients are reduced
unit by unit (reductions.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage

from toolkit.errors import UsageError
from toolkit.plan.lower import deferred, groups, stages, weights
from toolkit.plan.lower.compat import pipelines
from toolkit.plan.lower.lowered import Batch, Lowered
from toolkit.plan.lower.recorder import Recorder
from toolkit.plan.lower.reductions import Reductions, in_order
from toolkit.plan.lower.stages import StageModule
from toolkit.plan.lower.table import Runtime
from toolkit.plan.order import deadlock
from toolkit.plan.order.action import Action
from toolkit.plan.plan import PIPELINED_WAYS, Plan

# Inputs of the model travel under another name, for torch's step has keywords of its own.
_INPUT = "input_"


class Stretch(nn.Module):
    """A stage's module as torch calls it: activations in order, and all inputs of the batch by
    name, of which it takes its own.
    """

    def __init__(self, stage: StageModule) -> None:
        super().__init__()
        self.module = stage.module
        self.user_inputs = stage.user_inputs

    def forward(self, *received: Tensor, **batch: Tensor) -> Any:
        own = {name: batch[_INPUT + name] for name in self.user_inputs}
        outputs = self.module(*received, **own)
        # Only what is contiguous can be sent.
        if isinstance(outputs, Tensor):
            return outputs.contiguous()
        return tuple(output.contiguous() for output in outputs)


class TimedStage(PipelineStage):
    """A PipelineStage that records a span for each action, and says when its last backward is."""

    def __init__(
        self, *args: Any, recorder: Recorder, before_last: Callable[[], None], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.recorder = recorder
        self.before_last = before_last

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self.recorder.action(Action(self.stage_index, "F", fwd_chunk_id)):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Any = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> Any:
        if last_backward:
            self.before_last()
        kind = "B" if full_backward else "I"
        with self.recorder.action(Action(self.stage_index, kind, bwd_chunk_id)):
            return super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> Any:
        if last_backward:
            self.before_last()
        with self.recorder.action(Action(self.stage_index, "W", bwd_chunk_id)):
            return super().backward_weight_one_chunk(bwd_chunk_id, last_backward)


class Pipeline(Lowered):
    """The stages of one position, and what their gradients meet.

    `module` may be on meta: then only the parameters of these stages are made. Otherwise the whole
    model is there while it is cut, and what other positions hold is freed with it afterwards.
    """

    rung = "schedule: torch pipeline runtime with this plan's table"

    def __init__(
        self,
        plan: Plan,
        module: nn.Module,
        mesh: DeviceMesh,
        recorder: Recorder,
        example: Batch,
    ) -> None:
        super().__init__(plan, recorder)
        check(plan)
        rank = dist.get_rank()
        self.position = plan.along("pipeline", rank).index(rank)
        self.replica = groups.replica(plan, rank)
        held = plan.held_stages(self.position)
        self.device = next(iter(example.values())).device
        begins_at = [stage.begins_at for stage in plan.stages]
        if weights.on_meta(module):
            batch = {name: value.to("meta") for name, value in example.items()}
            cuts = stages.cut(module, batch, begins_at, plan.recompute)
            paths = _paths(module, cuts)
            weights.make(module, [cuts[index].module for index in held], self.device, plan.seed)
            for index in held:
                paths[index] = _paths(module, [cuts[index]])[0]
        else:
            cuts = stages.cut(module, example, begins_at, plan.recompute)
            paths = _paths(module, cuts)
        self.parameters = {name: value for index in held for name, value in paths[index].items()}
        self.inputs = tuple(dict.fromkeys(name for i in held for name in cuts[i].user_inputs))
        self.shared = _shared(plan, paths)
        row = plan.order[self.position]
        put_off = {action.stage for action in row if action.kind == "W"}
        self.reductions = Reductions(
            plan, mesh, in_order(plan, self.position, paths), self.shared, put_off
        )
        group = mesh.get_group("pipeline")
        self.runtime = Runtime(
            [
                TimedStage(
                    Stretch(cuts[index]),
                    index,
                    len(cuts),
                    self.device,
                    # Shapes are given, so that ranks need not ask each other for them.
                    input_args=cuts[index].inputs,
                    output_args=cuts[index].outputs,
                    group=group,
                    recorder=recorder,
                    before_last=functools.partial(self.reductions.arm, index),
                    dw_builder=(
                        deferred.defer(cuts[index].module).take if index in put_off else None
                    ),
                )
                for index in held
            ],
            plan.order,
            plan.microbatches,
            divisor=plan.microbatches * plan.num_replicas,
        )

    def zero_gradients(self) -> None:
        if self.reductions:
            self.reductions.zero()
        else:
            super().zero_gradients()

    def optimizer_parameters(self) -> dict[str, nn.Parameter]:
        whole = super().optimizer_parameters()
        sharded = self.reductions.sharded
        kept = {name: value for name, value in whole.items() if name not in sharded}
        return {**kept, **self.reductions.pieces}

    def after_update(self) -> None:
        if self.reductions.sharded:
            with self.recorder.span("gather parameters", "communication"):
                self.reductions.after_update()

    def saved(self, name: str, value: Tensor) -> Any:
        return self.reductions.saved(name, value)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.reductions.gradients()
        sharded = self.reductions.sharded
        yield from (found for found in super().gradients() if found[0] not in sharded)

    def step(self, batch: Batch) -> Tensor | None:
        first = self.replica * self.plan.rank_batch
        samples = slice(first, first + self.plan.rank_batch)
        loss = self.runtime.run({_INPUT + name: batch[name][samples] for name in self.inputs})
        if self.reductions:
            with self.recorder.span("wait for gradients", "communication"):
                self.reductions.settle()
        for name, group in self.shared.items():
            if name in self.parameters:
                with self.recorder.span(f"sum {name}", "communication"):
                    dist.all_reduce(self._gradient(name), group=group)
        return loss

    def _gradient(self, name: str) -> Tensor:
        """The gradient of a parameter; zeros where the stage reads no more than its shape."""
        parameter = self.parameters[name]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def global_loss(self, loss: Tensor | None) -> float:
        # The loss has one type on all ranks, whatever the model's: the widest.
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        if loss is not None:
            total += loss.double()
        dist.all_reduce(total)
        return float(total) / self.plan.num_replicas


def _paths(module: nn.Module, cuts: Sequence[StageModule]) -> list[dict[str, nn.Parameter]]:
    """Each stage's parameters by their path in the whole model."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [
        {names[id(parameter)]: parameter for parameter in cut.module.parameters()} for cut in cuts
    ]


def check(plan: Plan) -> None:
    """Raise UsageError for a plan that torch's pipeline runtime cannot run."""
    outside = [axis.name for axis in plan.mesh if axis.name not in ("pipeline", "replica", "data")]
    ways = sorted({entry.how for entry in plan.placements} - set(PIPELINED_WAYS))
    wide = [i for i, stage in enumerate(plan.stages) if len(stage.devices) > 1 or stage.no_grad]
    idle = [place for place, row in enumerate(plan.order) if not row]
    if outside or ways or wide or plan.splits:
        what = [
            *outside,
            *ways,
            *(f"stage {i}" for i in wide),
            *(["splits"] if plan.splits else []),
        ]
        raise UsageError(
            f"torch's pipeline runtime runs whole stages, one position each; this plan has "
            f"{', '.join(what)} beside",
            remedy="use one of gpipe, 1f1b, interleaved, zb-h1, zb-v or dualpipe-v",
        )
    if idle:
        raise UsageError(f"position {idle[0]} of the pipeline has no stage")
    faults = deadlock.find(plan.table.problem(), plan.order)
    if faults:
        raise UsageError(f"the order of {plan.strategy} cannot run: {faults[0]}")


def _shared(
    plan: Plan, paths: Sequence[Mapping[str, nn.Parameter]]
) -> dict[str, dist.ProcessGroup]:
    """Return the parameters held at several positions (a tied embedding), and the group of this
    rank's replica that holds each.
    """
    holders: dict[str, set[int]] = {}
    for stage, held in zip(plan.stages, paths, strict=True):
        for name, parameter in held.items():
            if parameter.requires_grad:
                holders.setdefault(name, set()).update(stage.devices)
    found = {}
    for name, positions in holders.items():
        if len(positions) == 1:
            continue
        for first in groups.members(plan, ("replica", "data"), 0):
            chain = plan.along("pipeline", first)
            # Every rank makes every group, in the same order, whether it is a member or not.
            group = dist.new_group([chain[position] for position in sorted(positions)])
            if dist.get_rank() in chain:
                found[name] = group
    return found


def lower(
    plan: Plan, module: nn.Module, mesh: DeviceMesh, recorder: Recorder, example: Batch
) -> Lowered:
    """Return what this rank runs of `plan`; see ladder.lower."""
    pipelines.self_test()
    return Pipeline(plan, module, mesh, recorder, example)
