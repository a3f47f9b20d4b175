"""Tensor parallel: Linears split by columns and rows with torch's DTensor styles."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from toolkit.errors import UsageError
from toolkit.plan.lower.sequence import Tokens
from toolkit.plan.plan import Plan
from toolkit.plan.sequence import TOKENS


class _SharedInput:
    """Gives column-split Linears that read one tensor one DTensor of it.

    Their input gradients are partial sums. Converted once, they are added here and all-reduced
    once; converted by each Linear (as ColwiseParallel alone would), query, key and value would
    all-reduce three times.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self._seen: weakref.ref[torch.Tensor] | None = None
        self._shared: DTensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        if isinstance(x, DTensor):  # gathered already: see lower/sequence.py
            return args
        if self._seen is None or self._seen() is not x or self._shared is None:
            self._shared = DTensor.from_local(x, self.mesh, (Replicate(),), run_check=False)
            self._seen = weakref.ref(x)
        return (self._shared, *args[1:])

    def forget(self) -> None:
        self._seen = self._shared = None


class Split:
    """A model whose Linears are split: what is left to do at the end of a step."""

    rung = "torch.distributed.tensor.parallel (DTensor)"

    def __init__(self, shared: _SharedInput, tokens: Tokens | None) -> None:
        self._shared = shared
        self._tokens = tokens
        if tokens:
            self.rung = f"{self.rung} with sequence parallel"

    def finish(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Called after the last backward."""
        self._shared.forget()
        if self._tokens:
            self._tokens.finish(parameters)


def split(plan: Plan, module: nn.Module, mesh: DeviceMesh) -> Split:
    """Split the Linears the plan places on the tensor axis, in place; every rank holds equal
    weights.
    """
    over = mesh["tensor"] if len(plan.mesh) > 1 else mesh
    columns, rows = plan.placed("column"), plan.placed("row")
    by_tokens = bool(plan.placed("sequence"))
    shared = _SharedInput(over)
    styles: dict[str, ParallelStyle] = {}
    for path in (*columns, *rows):
        found = module.get_submodule(path)
        if not isinstance(found, nn.Linear):
            raise UsageError(
                f"{path} is a {type(found).__name__}; only nn.Linear is split by this lowering",
                remedy="choose another strategy for this model",
            )
        if path in columns:
            styles[path] = ColwiseParallel()
        else:
            styles[path] = RowwiseParallel(output_layouts=Shard(TOKENS) if by_tokens else None)
    parallelize_module(module, over, styles, src_data_rank=None)
    for path in columns:
        # Before ColwiseParallel's own hook, which leaves a DTensor as it is.
        module.get_submodule(path).register_forward_pre_hook(shared, prepend=True)
    return Split(shared, Tokens(plan, module, over) if by_tokens else None)
