"""Tracing a repeated block once gives exactly what tracing every one of them does."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from toolkit import ir, models
from toolkit.ir import expand, repeat
from toolkit.models import zoo
from toolkit.models.model import Stack


@contextlib.contextmanager
def _traced_in_full(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(repeat, "tracing_once", lambda module, own: contextlib.nullcontext({}))
        yield


@pytest.fixture
def copies(monkeypatch):
    """How many calls were copied instead of traced."""
    found = []
    original = expand.Repeats.repeat

    def counted(self, earlier, path, inputs):
        found.append(path)
        return original(self, earlier, path, inputs)

    monkeypatch.setattr(expand.Repeats, "repeat", counted)
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-tiny", 3),
        ("llama-tiny", 3),
        ("t5-tiny", 1),
        ("swin-nano", 1),
        pytest.param("swin-tiny", 5, marks=pytest.mark.slow),
        pytest.param("evoformer-tiny", 4, marks=pytest.mark.slow),
    ],
)
def test_the_zoos_graphs_are_those_of_a_full_trace(name, expected, copies, monkeypatch):
    once = ir.trace_model(models.load(name))
    assert len(copies) == expected
    with _traced_in_full(monkeypatch):
        full = ir.trace_model(models.load(name))
    assert len(copies) == expected
    assert once == full
    assert list(once.tensors) == list(full.tensors)


@pytest.mark.parametrize(
    "name", ["gpt-tiny", pytest.param("evoformer-tiny", marks=pytest.mark.slow)]
)
def test_a_stack_traced_shallow_and_deepened_is_the_one_traced_whole(name):
    """With sizes that vary, and (Evoformer) run several times, at other sizes too."""
    stack = Stack("blocks", 6, lambda num_blocks: zoo.find(name, num_layers=num_blocks))
    whole = ir.trace_model(replace(zoo.find(name, num_layers=6), stack=None))
    deepened = ir.trace_model(replace(zoo.find(name, num_layers=6), stack=stack))
    assert deepened == whole
    assert list(deepened.tensors) == list(whole.tensors)
    assert deepened.at(batch=3).digest == whole.at(batch=3).digest


class Layer(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("table", torch.ones(width))

    def forward(self, x, mask=None):
        y = self.linear(x) * self.table
        return x + (y if mask is None else y * mask)


class Layers(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def _same(module, monkeypatch, *inputs) -> ir.OpGraph:
    """Trace once and in full, compare, return."""
    once = ir.trace(module, inputs, name="stack")
    with _traced_in_full(monkeypatch):
        assert ir.trace(module, inputs, name="stack") == once
    return once


def test_equal_layers_are_copied(copies, monkeypatch):
    x = torch.zeros(2, 4, requires_grad=True)
    graph = _same(Layers(*(Layer() for _ in range(5))), monkeypatch, x)
    assert copies == ["layers.1", "layers.2", "layers.3", "layers.4"]
    assert graph.blocks()[0].num_instances == 5


def test_the_module_is_left_as_it_was(monkeypatch):
    stack, forward = Layers(Layer(), Layer()), Layer.forward
    _same(stack, monkeypatch, torch.zeros(2, 4))
    assert Layer.forward is forward
    assert stack(torch.ones(2, 4)).shape == (2, 4)


def test_layers_that_differ_are_not(copies, monkeypatch):
    odd = Layer()
    odd.linear = nn.Linear(4, 4, bias=False)
    frozen = Layer().requires_grad_(False)
    evaluating = Layer().eval()
    labelled = Layer()
    labelled.number = 4
    hooked = Layer()
    hooked.register_forward_hook(lambda module, args, output: output * 2)
    layers = [Layer(), odd, frozen, evaluating, labelled, hooked, Layer()]
    graph = _same(Layers(*layers), monkeypatch, torch.zeros(2, 4, requires_grad=True))
    assert copies == ["layers.6"]
    assert sum(op.kind == "aten.mul" for op in graph.ops) == 8


def test_calls_that_differ_are_not(copies, monkeypatch):
    class Model(Layers):
        def forward(self, x):
            a, b, c, d = self.layers
            with torch.no_grad():
                x = b(a(x))
            x = d(c(x))
            x = a(x, mask=x)  # an input more, and the same one twice
            x = b(x, mask=x)
            return a(x[:1]) + c(x[:1])

    _same(Model(*(Layer() for _ in range(4))), monkeypatch, torch.zeros(3, 4))
    assert copies == ["layers.1", "layers.3", "layers.1", "layers.2"]


def test_shared_weights_and_outside_tensors_stay_shared(copies, monkeypatch):
    shared = nn.Linear(4, 4)

    class Sharing(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.shared = shared

        def forward(self, x, scale):
            return self.shared(super().forward(x)) * scale

    class Model(Layers):
        def __init__(self, *layers: nn.Module) -> None:
            super().__init__(*layers)
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x, self.scale)
            return x

    graph = _same(Model(*(Sharing() for _ in range(3))), monkeypatch, torch.zeros(2, 4))
    assert len(graph.consumers["scale"]) == 3
    assert len(graph.consumers["layers.0.shared.weight"]) == 3


class _Counting(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class _InPlace(Layer):
    def forward(self, x):
        return super().forward(x).relu_()


class _Reading(Layer):
    """Reads a tensor that was never handed to it."""

    outside: ClassVar[list[torch.Tensor]] = []

    def forward(self, x):
        return super().forward(x) + self.outside[-1]


@pytest.mark.parametrize("kind", [_Counting, _InPlace, _Reading])
def test_blocks_that_cannot_be_copied_are_traced_in_full(kind, monkeypatch):
    class Model(Layers):
        def forward(self, x):
            _Reading.outside.append(x * 3)
            for layer in self.layers:
                if kind is _Counting:
                    layer.calls = 0
                x = layer(x)
            _Reading.outside.clear()
            return x

    _same(Model(*(kind() for _ in range(3))), monkeypatch, torch.zeros(2, 4))


def test_several_outputs_and_plain_ones(copies, monkeypatch):
    class Many(Layer):
        def forward(self, x):
            y = super().forward(x)
            return {"y": y, "none": None, "parts": (y[:, :2], 3)}

    class Model(Layers):
        def forward(self, x):
            for layer in self.layers:
                found = layer(x)
                x = found["y"] + found["parts"][0].sum() * found["parts"][1]
            return x

    _same(Model(*(Many() for _ in range(3))), monkeypatch, torch.zeros(2, 4))
    assert copies
