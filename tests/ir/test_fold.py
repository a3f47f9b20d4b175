"""Repeated blocks fold, and only those that are the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from toolkit import ir


def test_layers_fold_to_one(subject):
    (block,) = subject("zoo:gpt-tiny").graph.blocks()
    assert block.paths == ("blocks.0", "blocks.1", "blocks.2", "blocks.3")
    assert block.module == "Block"
    assert {len(ops) for ops in block.ops} == {20}
    for kth in zip(*block.ops, strict=True):
        assert len({name.partition(":")[2] for name in kth}) == 1


def test_an_encoder_and_a_decoder_fold_apart(subject):
    blocks = subject("zoo:t5-tiny").graph.blocks()
    assert [block.name for block in blocks] == ["encoder.blocks.0", "decoder.blocks.0"]


def test_layers_inside_stages_fold(subject):
    blocks = subject("hf:swin").graph.blocks()
    # Both stages hold a plain and a shifted block, each once: nothing repeats.
    assert blocks == ()


class _Layer(nn.Module):
    def __init__(self, width: int, *, frozen: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width).requires_grad_(not frozen)
        self.scale = scale

    def forward(self, x):
        return x + self.linear(x) * self.scale


class _Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("odd", [{"frozen": True}, {"scale": 2.0}])
def test_a_layer_that_differs_is_not_folded_with_the_others(odd):
    layers = [_Layer(4), _Layer(4), _Layer(4, **odd), _Layer(4)]
    x = torch.zeros(2, 4, requires_grad=True)
    graph = ir.trace(_Stack(*layers), (x,), name="stack")
    assert [block.paths for block in graph.blocks()] == [("layers.0", "layers.1", "layers.3")]


def test_a_first_layer_whose_input_needs_no_gradient_is_another():
    graph = ir.trace(_Stack(*(_Layer(4) for _ in range(3))), (torch.zeros(2, 4),), name="stack")
    assert [block.paths for block in graph.blocks()] == [("layers.1", "layers.2")]


def test_one_module_called_again_is_one_block_not_two():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([_Layer(4), _Layer(4)])

        def forward(self, x):
            for _ in range(2):
                for layer in self.layers:
                    x = layer(x)
            return x

    graph = ir.trace(Twice(), (torch.zeros(2, 4, requires_grad=True),), name="twice")
    names = [op.name for op in graph.ops]
    assert len(set(names)) == len(names)
    (block,) = graph.blocks()
    assert block.num_instances == 2
    assert {len(ops) for ops in block.ops} == {6}
