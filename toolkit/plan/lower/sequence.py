"""Sequence parallel: activations between split regions hold a part of the tokens on each rank.

The model is not touched: hooks cut the activation before the first block of a run and gather it
after the last, and gather what a region (or a module computed whole) reads. Inside, modules see
shapes as ever. See plan/sequence.py for where, and for what is communicated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from toolkit.plan.lower.data import local
from toolkit.plan.plan import Plan
from toolkit.plan.sequence import TOKENS, around


class Tokens:
    """A model whose activations are split by tokens; made after its Linears were split."""

    def __init__(self, plan: Plan, module: nn.Module, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.num_shards = plan.size("data") if _sharded(plan) else 1
        placed = plan.placed("sequence")
        blocks = [path for path in placed if not _inside(path, placed)]
        whole = [path for path in placed if _inside(path, placed)]
        for run in _runs(blocks):
            module.get_submodule(run[0]).register_forward_pre_hook(
                _reading(self._cut), with_kwargs=True
            )
            module.get_submodule(run[-1]).register_forward_hook(_giving(self._gather))
        for path in regions(plan):
            module.get_submodule(path).register_forward_pre_hook(
                _reading(self._gather_split), with_kwargs=True
            )
        for path in whole:
            held = module.get_submodule(path)
            held.register_forward_pre_hook(_reading(self._gather), with_kwargs=True)
            held.register_forward_hook(_giving(self._cut))
        split = {*plan.placed("column"), *plan.placed("row"), *whole}
        self.partial = [
            name
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and _inside(name, blocks) and not _inside(name, split)
        ]

    def finish(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add up the partial gradients of the parameters that saw a part of the tokens."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for name in self.partial:
            parameter = parameters[name]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_dtype.setdefault(parameter.dtype, []).append(parameter.grad)
        for gradients in by_dtype.values():
            sizes = [self._padded(gradient) for gradient in gradients]
            flat = local(gradients[0]).new_zeros(sum(sizes))
            views = [
                view[: local(gradient).numel()]
                for view, gradient in zip(flat.split(sizes), gradients, strict=True)
            ]
            for view, gradient in zip(views, gradients, strict=True):
                view.copy_(local(gradient).flatten())
            dist.all_reduce(flat, group=self.mesh.get_group())
            for view, gradient in zip(views, gradients, strict=True):
                local(gradient).copy_(view.view_as(local(gradient)))

    def _padded(self, gradient: Tensor) -> int:
        """Elements of the largest rank's shard: all ranks send alike."""
        if self.num_shards == 1 or not isinstance(gradient, DTensor):
            return gradient.numel()
        rows = -(-gradient.shape[0] // self.num_shards)
        return rows * gradient[:1].numel() if gradient.dim() > 1 else rows

    def _cut(self, x: Tensor) -> Tensor:
        whole = DTensor.from_local(x, self.mesh, (Replicate(),), run_check=False)
        return whole.redistribute(placements=(Shard(TOKENS),)).to_local()

    def _gather(self, x: Tensor) -> Tensor:
        part = DTensor.from_local(x, self.mesh, (Shard(TOKENS),), run_check=False)
        return part.redistribute(placements=(Replicate(),)).to_local()

    def _gather_split(self, x: Tensor) -> Tensor:
        """Gather for Linears split by columns: gradients are partial sums, and come back so."""
        part = DTensor.from_local(x, self.mesh, (Shard(TOKENS),), run_check=False)
        return part.redistribute(placements=(Replicate(),))


def regions(plan: Plan) -> tuple[str, ...]:
    """Return the module around each region; a region's columns come before its row."""
    found, columns = [], []
    for entry in plan.placements:
        if entry.how == "column":
            columns.append(entry.module)
        elif entry.how == "row":
            found.append(around((*columns, entry.module)))
            columns = []
    return tuple(found)


def _sharded(plan: Plan) -> bool:
    return bool(plan.placed("shard"))


def _runs(blocks: Sequence[str]) -> Iterator[list[str]]:
    """Yield neighbours in one list of blocks together."""
    run: list[str] = []
    for path in blocks:
        parent, _, number = path.rpartition(".")
        if run:
            last, _, before = run[-1].rpartition(".")
            if last != parent or int(number) != int(before) + 1:
                yield run
                run = []
        run.append(path)
    if run:
        yield run


def _inside(path: str, modules: Any) -> bool:
    """Whether a path lies below one of the modules."""
    return any(path.startswith(f"{module}.") for module in modules)


def _reading(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A hook that changes the first tensor a module is called with, wherever it is passed."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = (*args, *kwargs.values())
        first = next(value for value in given if isinstance(value, Tensor))
        changed = change(first)

        def swap(value: Any) -> Any:
            return changed if value is first else value

        return tuple(map(swap, args)), {name: swap(value) for name, value in kwargs.items()}

    return hook


def _giving(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A hook that changes the tensor a module returns, or the first of a tuple."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    return hook
