"""What is leaned on in torch's pipelining and export, with its self-test."""

from __future__ import annotations

import functools
import inspect

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    _Action as TorchAction,
)
from torch.distributed.pipelining.schedules import (
    _PipelineScheduleRuntime as PipelineRuntime,
)
from torch.fx import Node

from toolkit.plan.lower.compat import refuse

__all__ = ["PipelineRuntime", "TorchAction", "module_path", "self_test"]


def module_path(node: Node) -> str:
    """Return the path of the module an exported operator was called in ("" for the root).

    `nn_module_stack` is written by torch.export and described nowhere but in its sources.
    """
    stack = node.meta.get("nn_module_stack") or {}
    return next((entry[0] for entry in reversed(stack.values())), "")


def _exports_module_paths() -> bool:
    class Inner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([Inner(), Inner()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.parts:
                x = part(x)
            return x

    exported = torch.export.export(Outer(), (torch.zeros(2),), strict=False).module(
        check_guards=False
    )
    calls = [node for node in exported.graph.nodes if node.op == "call_function"]
    return [module_path(node) for node in calls] == ["parts.0", "parts.1"]


def _has_methods(owner: type, wanted: dict[str, tuple[str, ...]]) -> bool:
    """Whether each method is there and its first parameters (after self) are these."""
    for name, parameters in wanted.items():
        method = getattr(owner, name, None)
        if method is None:
            return False
        if tuple(inspect.signature(method).parameters)[1 : 1 + len(parameters)] != parameters:
            return False
    return True


def _stage_has_chunk_methods() -> bool:
    """The schedule calls these three per action; spans are measured by overriding them."""
    wanted = {
        "forward_one_chunk": ("fwd_chunk_id",),
        "backward_one_chunk": ("bwd_chunk_id", "loss", "full_backward", "last_backward"),
        "backward_weight_one_chunk": ("bwd_chunk_id", "last_backward"),
    }
    return _has_methods(PipelineStage, wanted)


def _runtime_takes_tables() -> bool:
    """`table.Runtime` hands it a table, and overrides where it keeps losses."""
    wanted = {
        "_prepare_schedule_with_comms": ("actions",),
        "_maybe_compute_loss": ("stage", "output", "target_mbs", "mb_index"),
        "_maybe_get_loss": ("stage", "mb_index"),
        "_update_losses": ("stages", "losses"),
    }
    return _has_methods(PipelineRuntime, wanted) and all(
        str(TorchAction.from_str(text)) == text for text in ("0F1", "2B0", "1I3", "1W3")
    )


@functools.cache
def self_test() -> None:
    """Raise ToolkitError naming what this torch does differently."""
    refuse(
        [
            ("torch.export keeps module paths in nn_module_stack", _exports_module_paths),
            ("PipelineStage's methods for one microbatch", _stage_has_chunk_methods),
            ("a pipeline runtime that takes a table of actions", _runtime_takes_tables),
        ]
    )
