"""Pipeline parallel: one stage a rank under torch.distributed.pipelining's 1F1B schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.utils.checkpoint import checkpoint

from toolkit.errors import UsageError
from toolkit.plan.lower import stages
from toolkit.plan.lower.lowered import Batch, Lowered
from toolkit.plan.lower.recorder import Recorder
from toolkit.plan.lower.stages import StageModule
from toolkit.plan.order import simple
from toolkit.plan.order.action import Action
from toolkit.plan.plan import Plan


class TimedStage(PipelineStage):
    """A PipelineStage that records a span for each forward and backward of a microbatch."""

    def __init__(self, *args: Any, recorder: Recorder, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recorder = recorder

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self.recorder.action(Action(self.stage_index, "F", fwd_chunk_id)):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self.recorder.action(Action(self.stage_index, "B", bwd_chunk_id)):
            return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)


class Recomputed(nn.Module):
    """A stage that keeps only its inputs, and runs forward again before its backward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.module, *args, use_reentrant=False, **kwargs)


def make_stage(
    stages: tuple[StageModule, ...],
    index: int,
    *,
    batch: Mapping[str, Tensor],
    device: torch.device,
    group: dist.ProcessGroup,
    recompute: bool,
    recorder: Recorder,
) -> TimedStage:
    """Return the runnable stage `index`; `batch` is an example microbatch by input name.

    Shapes are given, so that ranks need not ask each other for them.
    """
    made = stages[index]
    first = tuple(batch[name] for name in made.user_inputs) if index == 0 else ()
    return TimedStage(
        Recomputed(made.module) if recompute else made.module,
        index,
        len(stages),
        device,
        input_args=made.inputs + first,
        output_args=made.outputs,
        group=group,
        recorder=recorder,
    )


def shared_parameters(
    stages: tuple[StageModule, ...], names: Mapping[int, str]
) -> dict[str, tuple[int, ...]]:
    """Return parameters held by several stages (a tied embedding) -> those stages.

    `names` maps the id of a parameter to its path in the whole model.
    """
    holders: dict[str, list[int]] = {}
    for index, made in enumerate(stages):
        for parameter in made.module.parameters():
            holders.setdefault(names[id(parameter)], []).append(index)
    return {name: tuple(found) for name, found in holders.items() if len(found) > 1}


def mean(losses: list[Tensor]) -> Tensor:
    """The loss of the batch: microbatches are of equal size, so it is the mean of theirs."""
    return torch.stack([loss.detach() for loss in losses]).mean()


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
        self.stage = make_stage(
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
            for name, holders in shared_parameters(cuts, names).items()
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
        return mean(losses) if last else None

    def global_loss(self, loss: Tensor | None) -> float:
        last = len(self.plan.stages) - 1
        # The loss has one type on all ranks, whatever the model's: the widest.
        total = torch.zeros((), dtype=torch.float64, device=self.stage.device)
        if loss is not None:
            total += loss.double()
        dist.broadcast(total, dist.get_global_rank(self.group, last), group=self.group)
        return float(total)
