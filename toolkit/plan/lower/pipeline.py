"""Rung 2 of the ladder: stages of a pipeline under torch's pipeline runtime and the plan's table.

Every stage lies on one position; a position may hold several (interleaved, V-shaped). Beside the
pipeline axis the mesh may have replica and data axes, over which each stage's gradients are reduced
unit by unit. A reduction starts in the stage's last backward as soon as its unit is complete; under
schedules that put weights' gradients off, at the end of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage

from toolkit.errors import UsageError
from toolkit.plan.lower import deferred, groups, stages
from toolkit.plan.lower.data import Buckets, Gradients
from toolkit.plan.lower.lowered import Batch, Lowered
from toolkit.plan.lower.recorder import Recorder
from toolkit.plan.lower.stages import StageModule
from toolkit.plan.lower.table import Runtime
from toolkit.plan.order import deadlock
from toolkit.plan.order.action import Action
from toolkit.plan.plan import Plan

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
    """The stages of one position, and what their gradients meet."""

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
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        cuts = stages.cut(
            module, example, [stage.begins_at for stage in plan.stages], plan.recompute
        )
        paths = [
            {names[id(parameter)]: parameter for parameter in cut.module.parameters()}
            for cut in cuts
        ]
        self.parameters = {name: value for index in held for name, value in paths[index].items()}
        self.inputs = tuple(dict.fromkeys(name for i in held for name in cuts[i].user_inputs))
        self.shared = _shared(plan, paths)
        self.reductions = self._reductions(mesh, held, paths)
        self.device = next(iter(self.parameters.values())).device
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
                    before_last=self._before_last(index),
                    dw_builder=deferred.defer(cuts[index].module).take
                    if self._splits(index)
                    else None,
                )
                for index in held
            ],
            plan.order,
            plan.microbatches,
            divisor=plan.microbatches * plan.num_replicas,
        )

    def _reductions(
        self, mesh: DeviceMesh, held: Sequence[int], paths: Sequence[Mapping[str, nn.Parameter]]
    ) -> dict[int, Gradients]:
        """The reductions over replicas by stage: those whose parameters it is the last to use."""
        plan = self.plan
        if plan.num_replicas == 1:
            return {}
        group = groups.along(plan, ("replica", "data"), mesh)
        row = [action.stage for action in plan.order[self.position] if action.kind in "BW"]
        ends = {stage: at for at, stage in enumerate(row)}
        last = {
            name: index
            for index in sorted(held, key=lambda index: ends[index])
            for name in paths[index]
        }
        return {
            index: Buckets(
                {name: value for name, value in paths[index].items() if last[name] == index},
                plan.placed("replicate"),
                group,
            )
            for index in held
        }

    def _before_last(self, index: int) -> Callable[[], None]:
        def arm() -> None:
            # What is put off comes after backward's hooks, and they would reduce without it.
            if index in self.reductions and not self._splits(index):
                self.reductions[index].arm(last=True)

        return arm

    def _splits(self, index: int) -> bool:
        """Whether some backward of the stage is in two halves."""
        row = self.plan.order[self.position]
        return any(action.stage == index and action.kind == "W" for action in row)

    def zero_gradients(self) -> None:
        if not self.reductions:
            super().zero_gradients()
        for reduction in self.reductions.values():
            reduction.zero()

    def step(self, batch: Batch) -> Tensor | None:
        first = self.replica * self.plan.rank_batch
        samples = slice(first, first + self.plan.rank_batch)
        loss = self.runtime.run({_INPUT + name: batch[name][samples] for name in self.inputs})
        if self.reductions:
            with self.recorder.span("wait for gradients", "communication"):
                for reduction in self.reductions.values():
                    reduction.settle(last=True)
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


def check(plan: Plan) -> None:
    """Raise UsageError for a plan that torch's pipeline runtime cannot run."""
    outside = [axis.name for axis in plan.mesh if axis.name not in ("pipeline", "replica", "data")]
    ways = sorted({entry.how for entry in plan.placements} - {"replicate"})
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
    return Pipeline(plan, module, mesh, recorder, example)
