"""Operators that read around themselves split with a halo: they compute the same, gradients too,
and only what lies around is communicated.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from toolkit import ir, models
from toolkit.errors import InfeasibleError, ToolkitError, UsageError
from toolkit.hardware import find_cluster
from toolkit.ir import dims, interpret
from toolkit.plan import own, subject
from toolkit.plan.lower.program import local
from toolkit.plan.program import Program, Replicate, Split

sys.path.append(str(Path(__file__).parent))
from program_check import check

EXACT = 1e-12  # of float64


class Around(nn.Module):
    """One operator on something that has a gradient, all of it different."""

    def __init__(self, shape, function, weight=None):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(shape))
        self.function = function
        if weight is not None:
            self.weight, self.bias = (
                nn.Parameter(torch.randn(weight)), nn.Parameter(torch.randn(weight[0]))
            )  # fmt: skip

    def forward(self, x):
        given = (self.weight, self.bias) if hasattr(self, "weight") else ()
        return self.function(x * self.scale, *given)


def program_of(shape, function, weight=None):
    """A program of `x * scale` and the operator, with its tensors; and the operator's name."""
    torch.manual_seed(0)
    module, x = Around(shape, function, weight), torch.randn(shape)
    graph = ir.trace(module, (x,), name="around", axes={})
    tensors = {**interpret.weights(graph, module), graph.inputs[0]: x}
    doubles = {name: value.detach().to(torch.float64) for name, value in tensors.items()}
    return Program(graph), doubles, graph.ops[-1].name


def numbers(low, high, count):
    return st.tuples(*[st.integers(low, high)] * count)


@st.composite
def operators(draw):
    """(shape of the input, the operator, shape of its weight) with any window, and any shift."""
    kind = draw(st.sampled_from(["conv1d", "conv2d", "max_pool2d", "avg_pool2d", "roll"]))
    rank = 1 if kind == "conv1d" else 2
    kernel, stride, step = (draw(numbers(1, high, rank)) for high in (4, 3, 2))
    sides = tuple(draw(st.integers(step[i] * (kernel[i] - 1) + 1, 14)) for i in range(rank))
    if kind == "roll":
        shifts = draw(numbers(-20, 20, 2))
        return (2, 3, *sides), lambda x: x.roll(shifts, (2, 3)), None
    if kind == "avg_pool2d":
        padding = tuple(draw(st.integers(0, width // 2)) for width in kernel)
        counts = draw(st.booleans())
        return (2, 2, *sides), lambda x: functional.avg_pool2d(
            x, kernel, stride, padding, count_include_pad=counts
        ), None  # fmt: skip
    if kind == "max_pool2d":
        padding = tuple(draw(st.integers(0, width // 2)) for width in kernel)
        ceil = draw(st.booleans())
        return (2, 2, *sides), lambda x: functional.max_pool2d(
            x, kernel, stride, padding, step, ceil_mode=ceil
        ), None  # fmt: skip
    padding, function = draw(numbers(0, 4, rank)), getattr(functional, kind)
    return (2, 2, *sides), lambda x, weight, bias: function(
        x, weight, bias, stride, padding, step
    ), (4, 2, *kernel)  # fmt: skip


@settings(deadline=None, max_examples=20, phases=[Phase.explicit, Phase.generate])
@given(operator=operators(), data=st.data())
def test_parts_put_together_are_the_whole_and_so_are_their_gradients(operator, data):
    program, tensors, name = program_of(*operator)
    annotation = program.annotation(name)
    for _ in range(2):
        for part in program.ops(name):
            names = [*annotation.with_halo, *annotation.with_halo, *annotation.splittable]
            choices = [
                Split(dim, num)
                for dim in names
                for low, high in [part.interval(dim, annotation)]
                for num in range(2, high - low + 1)
                if (high - low) % num == 0 and num <= 4
            ]
            if choices and len(program.ops(name)) < 8:
                program.trans(part, data.draw(st.sampled_from(choices)))
    if data.draw(st.booleans()):
        program.trans(program.ops()[0], Split(0, 2))
    for op in program.graph.ops:
        for index, part in enumerate(program.ops(op.name)):
            program.assign(part, index % 4)
    try:
        found = program.verify(tensors).max_error
    except InfeasibleError as error:
        # Shares of a bias may be read by differing numbers of parts: refused, and never wrong.
        if "partial sums are read by" not in error.message:
            raise
        assume(False)
    assert found < EXACT


def reads(program, name, num, dim):
    """What each of `num` parts reads of its first input along `dim`, in pieces."""
    parts = program.trans(name, Split(dim, num))
    found = program.annotation(name)
    return [[mask.box[dim] for place, mask in part.reads(found) if place == 0] for part in parts]


def test_a_part_reads_what_lies_around_it_and_no_more():
    def convolution(x, weight, bias):
        return functional.conv2d(x, weight, bias, padding=1)

    program, _, name = program_of((1, 2, 12, 4), convolution, (2, 2, 3, 3))
    assert str(program.annotation(name)) == "1 k+ [a] [b], n k+ c^ d^, ~n -> 1 n a b"
    assert reads(program, name, 3, 2) == [[(0, 5)], [(3, 9)], [(7, 12)]]
    program, _, name = program_of((1, 8, 3), lambda x: x.roll(-2, 1))
    assert reads(program, name, 2, 1) == [[(2, 6)], [(6, 8), (0, 2)]]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: functional.max_pool2d(x, 2, ceil_mode=True),
        lambda x: functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
        lambda x: functional.conv2d(x, x.new_ones(2, 2, 3, 3), padding="same"),
        lambda x: functional.conv2d(x, x.new_ones(2, 2, 1, 1), padding=2),
        lambda x: functional.adaptive_avg_pool2d(x, 3),
        lambda x: x.roll(1),
        lambda x: x.roll((1, 2), (2, 2)),
    ],
)
def test_what_is_not_supported_is_refused_by_name(function):
    program, _, name = program_of((2, 2, 7, 7), function)
    assert program.annotation(name).with_halo == ()
    with pytest.raises(UsageError, match=f"{name.split('.')[0]} cannot be split along dim 2"):
        program.trans(name, Split(2, 7))


def test_slices_alone_never_include_a_dim_with_a_halo():
    """Whoever knows slices only, as the search does, leaves these dims whole."""
    program, _, name = program_of((2, 3, 8, 8), lambda x: x.roll((1, 1), (2, 3)))
    found = program.annotation(name)
    assert (found.splittable, found.with_halo) == (("a", "b"), ("c", "d"))
    with pytest.raises(UsageError, match="cannot be split; these can: a, b"):
        found.partition("c")
    assert dims.annotation(program.graph.ops[-1], program.graph) == found


def spread(program, dims_of, num):
    """Part i of every operator on device i: split where named, else replicated."""
    for op in program.ops():
        algorithm = Split(dims_of[op.op], num) if op.op in dims_of else Replicate(num)
        for device, part in enumerate(program.trans(op, algorithm)):
            program.assign(part, device)


def by_rows(program):
    """Split an image's rows over two devices, from the patches to the first merging; after that a
    map is one window.
    """
    rows = program.flow("image_BCII", dim=2)
    chosen = program.ops("patches", ":permute", "patch_norm", "blocks.0", "blocks.1", "blocks.2")
    assert {"blocks.0.attention:softmax", "blocks.1.attention:softmax", "blocks.1:roll"} <= set(
        rows
    )
    spread(program, {part.op: rows[part.op] for part in chosen if part.op in rows}, 2)


def test_swin_by_rows_exchanges_the_shifted_rows_alone():
    """The second of two blocks is shifted by two rows: two rows go each way, and back after it."""
    model = models.load("swin-nano")
    graph = ir.trace_model(model, batch=1)
    args, _ = model.example(batch=1, device="cpu")
    weights = interpret.weights(graph, model.build("cpu"))
    tensors = {**weights, **dict(zip(graph.inputs, args, strict=True))}
    program = Program(graph)
    by_rows(program)
    doubles = {
        name: value.detach().double() if value.is_floating_point() else value
        for name, value in tensors.items()
    }
    assert program.verify(doubles).max_error < EXACT
    shifted, back, gathered = program.freeze().adapters(find_cluster("h100x2"))
    for adapter in (shifted, back):
        sizes = [(step.kind, step.num_bytes) for step in adapter.communication]
        assert sizes == [("send", 2 * 8 * 32 * 4)] * 2
    assert gathered.tensor.name == "blocks.2.reduce:linear"


def test_swin_by_rows_on_two_ranks(two_ranks):
    """The own executor carries the same, with what it recomputes, and as was predicted."""
    swin = subject.load("swin-nano", batch=2)
    plan = own.plan(by_rows, swin, two_ranks, microbatches=2, recompute=True)
    (found,) = check([plan], swin)
    assert found["rung"] == "program: own executor"
    assert all(counted["send"] for counted in found["counted"])


@pytest.mark.slow
def test_convolutions_by_rows_on_two_ranks(toys, two_ranks):
    """On two, what is sent forward is received backward; on more, the edges exchange less."""
    images = subject.load("toy_models:convolutions", batch=2)

    def plan(cluster):
        return own.plan(
            lambda program: spread(program, program.flow("image", dim=2), cluster.num_devices),
            images, cluster,
        )  # fmt: skip

    check([plan(two_ranks)], images)
    four = find_cluster("cpux4")
    with pytest.raises(ToolkitError, match="communicate differently"):
        local.traffic(plan(four), images.graph, four)
