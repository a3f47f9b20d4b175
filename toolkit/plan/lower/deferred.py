"""Backward in two halves: the gradients of Linears' weights put off from I to W.

I is a whole backward, but where it would multiply for a Linear's weight it puts the two factors
aside: what entered the Linear, and the gradient of what left it. W multiplies them. Everything else
is done in I: other parameters (biases, norms, embeddings, convolutions) are little work. So
between I and W a stage holds those two factors of each Linear, and nothing else of the microbatch;
a recomputed block runs again once, in I (Qi et al., arXiv 2401.10241, section 2).

torch's own split (stage_backward_input, stage_backward_weight) works on autograd's graph instead.
It loses the gradients of what no input of the stage leads to (T5's position bias), runs recomputed
blocks in both halves, and leaves the whole backward of the first stage to W.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

_NAME = "deferred_linear"


class Deferred(nn.Module):
    """The Linears of one stage; `take` gives what the last backward put off."""

    def __init__(self) -> None:
        super().__init__()
        self._pending: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    def forward(self, x: Tensor, weight: nn.Parameter, bias: Tensor | None = None) -> Tensor:
        y: Tensor = _Linear.apply(x, weight, bias, self._pending)
        return y

    def take(self) -> Callable[[], None]:
        """Return what adds the gradients put off so far to their weights'."""
        taken = list(self._pending)
        self._pending.clear()

        def add() -> None:
            with torch.no_grad():
                while taken:
                    weight, gradient, x = taken.pop()
                    found = gradient.flatten(0, -2).t() @ x.flatten(0, -2)
                    if weight.grad is None:
                        weight.grad = found
                    else:
                        weight.grad += found

        return add


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias, whose backward leaves the weight out."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        bias: Tensor | None,
        pending: list[tuple[nn.Parameter, Tensor, Tensor]],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.pending = weight, pending
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        ctx.pending.append((ctx.weight, gradient, x))
        grad_x = gradient @ weight if ctx.needs_input_grad[0] else None
        grad_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, None


def defer(stage: GraphModule) -> Deferred:
    """Put off the weights of the Linears in `stage`, those in recomputed blocks included, in place.

    A weight that is computed, or that takes part otherwise, stays with autograd.
    """
    deferred = Deferred()
    graphs = [found for found in stage.modules() if isinstance(found, GraphModule)]
    for module in graphs:
        module.add_module(_NAME, deferred)
        for node in module.graph.find_nodes(
            op="call_function", target=torch.ops.aten.linear.default
        ):
            weight = node.args[1]
            if weight.op != "get_attr" or not _trained(module, str(weight.target)):
                continue
            with module.graph.inserting_before(node):
                call = module.graph.call_module(_NAME, node.args, node.kwargs)
            node.replace_all_uses_with(call)
            module.graph.erase_node(node)
        module.recompile()
    return deferred


def _trained(module: GraphModule, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    found = getattr(module.get_submodule(owner), name)
    return isinstance(found, nn.Parameter) and found.requires_grad
