"""Pipeline parallel: one stage a rank under torch.distributed.pipelining's 1F1B schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.utils.checkpoint import checkpoint

from toolkit.plan.lower.recorder import Recorder
from toolkit.plan.lower.stages import StageModule
from toolkit.plan.order.action import Action


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


def stage(
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
