"""Saved activations, predicted, against those autograd really keeps on this CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from toolkit import ir
from toolkit.errors import ToolkitError
from toolkit.ir import backward

# transformers builds these two models' masks a little differently eagerly than when exported.
TOLERANCE = {"t5": 0.001, "vit": 0.05}


def measured(module: nn.Module, args, kwargs) -> int:
    """Bytes of the distinct storages autograd keeps, but for parameters, buffers and inputs."""
    known = [*module.parameters(), *module.buffers(), *pytree.tree_leaves((args, kwargs))]
    ours = {t.untyped_storage().data_ptr() for t in known if isinstance(t, torch.Tensor)}
    held: list[torch.Tensor] = []  # keeps every storage alive, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(*args, **kwargs)
    assert output is not None
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(size for address, size in storages.items() if address not in ours)


def predicted(graph: ir.OpGraph) -> int:
    return sum(kept.num_bytes for kept in backward.saved(graph, kernels="cpu"))


def test_saved_activations_are_what_autograd_keeps(traced):
    real = measured(traced.build("cpu"), *traced.example("cpu"))
    assert predicted(traced.graph) == pytest.approx(real, rel=TOLERANCE.get(traced.name, 0))


class _Mixed(nn.Module):
    """One of everything that saves something unusual."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 48)
        self.norm = nn.GroupNorm(4, 16)
        self.conv = nn.Conv2d(16, 8, 3, padding=1)
        self.drop = nn.Dropout(dropout)
        self.attention_dropout = dropout

    def forward(self, x):
        q, k, v = self.linear(x).view(2, 9, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.attention_dropout)
        y = self.norm(y.transpose(2, 3).reshape(2, 16, 9).contiguous())
        y = self.conv(y.reshape(2, 16, 3, 3)).relu() * self.drop(y.reshape(2, 16, 3, 3))[:, :8]
        y = torch.where(y > 0, y.sigmoid(), y.exp()).amax(dim=-1)
        return nn.functional.softplus(y).log().clamp(min=0.1).sqrt()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_operators_the_models_do_not_use_agree_too(dropout):
    module, x = _Mixed(dropout), torch.randn(2, 9, 16)
    graph = ir.trace(module, (x,), name="mixed", axes={})
    assert predicted(graph) == measured(module, (x,), {})


def test_autocast_keeps_cast_copies_of_the_weights():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.second(self.first(x))

    module, x = Model(), torch.randn(3, 8)
    graph = ir.trace(module, (x,), name="model", axes={})
    assert predicted(graph) == measured(module, (x,), {})


def test_dropout_masks_are_smaller_on_a_gpu(subject):
    graph = subject("hf:gpt2").graph
    on_gpu = sum(kept.num_bytes for kept in backward.saved(graph, kernels="cuda"))
    assert on_gpu < predicted(graph)


def test_nothing_is_saved_without_gradients():
    module = nn.Linear(4, 4).requires_grad_(False)
    graph = ir.trace(module, (torch.zeros(2, 4),), name="frozen")
    assert backward.saved(graph) == ()


def test_memory_saved_by_several_operators_counts_once(subject):
    graph = subject("zoo:llama-tiny").graph
    found = backward.saved(graph)
    assert len({kept.name for kept in found}) == len(found)
    normed = next(kept for kept in found if len(kept.ops) == 3)
    assert [op.rpartition(":")[0].rpartition(".")[2] for op in normed.ops] == [
        "query", "key", "value"
    ]  # fmt: skip


def test_an_operator_without_a_rule_is_an_error():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return torch.fmod(x * self.weight, 2.0)

    graph = ir.trace(Model(), (torch.zeros(2, 4),), name="model")
    with pytest.raises(ToolkitError, match=r"aten.fmod.Scalar.*no rule for what autograd saves"):
        backward.saved(graph)
