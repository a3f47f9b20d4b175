"""What this package leans on in torch beyond its documented interface, each with its self-test.

Everything else imports public names only. `self_test` runs first in every rank, so that a torch
that has moved is named at once and not by a wrong gradient.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.errors import ToolkitError

__all__ = ["TorchDispatchMode", "module_path", "self_test"]


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


def _stage_has_chunk_methods() -> bool:
    """The schedule calls these two per action; spans are measured by overriding them."""
    names = {
        "forward_one_chunk": "fwd_chunk_id",
        "backward_one_chunk": "bwd_chunk_id",
    }
    return all(
        list(inspect.signature(getattr(PipelineStage, name)).parameters)[1:2] == [first]
        for name, first in names.items()
        if hasattr(PipelineStage, name)
    ) and all(hasattr(PipelineStage, name) for name in names)


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
            ("TorchDispatchMode sees every operator", _modes_see_operators),
            ("PipelineStage.forward_one_chunk and backward_one_chunk", _stage_has_chunk_methods),
        )
        if not works()
    ]
    if wrong:
        raise ToolkitError(
            f"torch {torch.__version__} does not offer: {'; '.join(wrong)}",
            remedy="use the torch version in constraints.txt",
        )
