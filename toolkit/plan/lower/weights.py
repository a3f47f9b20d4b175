"""Giving memory and initial weights to what a rank holds, and to nothing else.

A zoo model's initial weights depend on the seed and a parameter's name alone (models.init), so
stages can be cut from a model on meta, and the parts of them that a rank holds be made afterwards:
the weights are those the whole model would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.node import map_aggregate

from toolkit import models
from toolkit.errors import ToolkitError


def on_meta(module: nn.Module) -> bool:
    """Whether the module has been made without memory."""
    return any(parameter.is_meta for parameter in module.parameters())


def make(
    module: nn.Module, held: Sequence[GraphModule], device: torch.device, seed: int
) -> nn.Module:
    """Give the parameters that the graphs in `held` share with `module` memory on `device` and
    initial weights from `seed`. `module`, which was on meta, loses its others; return it.

    Raises ToolkitError when a graph has constants on meta: their values are not known.
    """
    wanted = {id(parameter) for stage in held for parameter in stage.parameters()}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if id(parameter) not in wanted:
                setattr(part, name, None)
    before = {path: id(value) for path, value in module.named_parameters(remove_duplicate=False)}
    models.initialise(models.materialise(module, device), seed=seed)
    made = {before[path]: value for path, value in module.named_parameters(remove_duplicate=False)}
    for stage in held:
        for part in stage.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                setattr(part, name, made[id(parameter)])
        for part in stage.modules():
            if isinstance(part, GraphModule):
                _move(part, device)
    return module


def _move(stage: GraphModule, device: torch.device) -> None:
    """What was traced to be made on meta (positions, masks) is made on `device`."""

    def moved(leaf: Any) -> Any:
        return device if isinstance(leaf, torch.device) and leaf.type == "meta" else leaf

    for node in stage.graph.nodes:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            found = getattr(stage.get_submodule(owner), name)
            if isinstance(found, Tensor) and found.is_meta:
                raise ToolkitError(
                    f"the model makes a constant ({node.target}) whose value a trace without "
                    "memory does not have",
                    remedy="register it as a parameter, or compute it from the inputs",
                )
        node.args = map_aggregate(node.args, moved)
        node.kwargs = map_aggregate(node.kwargs, moved)
    stage.recompile()
