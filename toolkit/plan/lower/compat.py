"""What this package leans on in torch beyond its documented interface, each with its self-test.

Everything else imports public names only. `self_test` runs first in every rank, so that a torch
that has moved is named at once and not by a wrong gradient.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import ProcessGroup
from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]  # not in __all__
    _resolve_process_group,
)
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    _Action as TorchAction,
)
from torch.distributed.pipelining.schedules import (
    _PipelineScheduleRuntime as PipelineRuntime,
)
from torch.distributed.tensor import DTensor
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.errors import ToolkitError

__all__ = [
    "PipelineRuntime", "TorchAction", "TorchDispatchMode",
    "group_of", "module_path", "relocate", "self_test",
    "start_fake_group",
]  # fmt: skip


def module_path(node: Node) -> str:
    """Return the path of the module an exported operator was called in ("" for the root).

    `nn_module_stack` is written by torch.export and described nowhere but in its sources.
    """
    stack = node.meta.get("nn_module_stack") or {}
    return next((entry[0] for entry in reversed(stack.values())), "")


def group_of(args: tuple[Any, ...]) -> dist.ProcessGroup:
    """Return the group that a c10d operator called with `args` is over.

    c10d's own operators take it boxed, the functional ones take its name, last.
    """
    boxed = next((found for found in args if isinstance(found, torch.ScriptObject)), None)
    if boxed is not None:
        return ProcessGroup.unbox(boxed)
    return _resolve_process_group(args[-1])


def start_fake_group(num_ranks: int) -> None:
    """Be rank 0 of `num_ranks` ranks that are not there; every call returns at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())


def relocate(parameter: nn.Parameter, memory: torch.Tensor) -> None:
    """Make `memory` that of a parameter, or of this rank's part of a split one; values are lost.

    `DTensor.to_local` of a parameter is a view, whose memory may be changed to no effect.
    """
    part = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
    part.data = memory


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


def _modes_see_operators() -> bool:
    """Counting communication stands on a mode being handed every operator that runs."""
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.ones(2).neg()
    return "aten.neg.default" in seen


def self_test() -> None:
    """Raise ToolkitError naming what this torch does differently."""
    wrong = [
        what
        for what, works in (
            ("torch.export keeps module paths in nn_module_stack", _exports_module_paths),
            ("DTensor._local_tensor", lambda: "_local_tensor" in DTensor.__slots__),
            ("TorchDispatchMode sees every operator", _modes_see_operators),
            ("PipelineStage's methods for one microbatch", _stage_has_chunk_methods),
            ("a pipeline runtime that takes a table of actions", _runtime_takes_tables),
        )
        if not works()
    ]
    if wrong:
        raise ToolkitError(
            f"torch {torch.__version__} does not offer: {'; '.join(wrong)}",
            remedy="use the torch version in constraints.txt",
        )
