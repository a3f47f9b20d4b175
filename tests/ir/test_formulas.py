"""FLOPs agree exactly with torch's own counter, forward and backward, wherever both count."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop

from toolkit import ir
from toolkit.cost.work import Work
from toolkit.ir import backward, einsum, formulas, show
from toolkit.ir.formulas import ATTENTION


def counted(module: nn.Module, args, kwargs) -> tuple[float, float]:
    """FLOPs of a real forward and backward, the model unmodified, attention as plain products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        leaves = pytree.tree_leaves(module(*args, **kwargs))
        forward = counter.get_total_flops()
        sum(x.float().sum() for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad
            ).backward()  # fmt: skip
        return forward, counter.get_total_flops() - forward


def recomputed(graph: ir.OpGraph) -> float:
    """What fused attention computes twice, which plain products do not."""
    found = 0.0
    for op in graph.ops:
        if op.kind == ATTENTION and formulas.is_fused(op, graph, "cpu"):
            query, key = (formulas.tensor_of(op, graph, name) for name in ("query", "key"))
            found += 2.0 * query.numel * key.shape[-2]
    return found


def test_flops_equal_flop_counter_forward_and_backward(traced):
    graph = traced.graph
    forward, back = counted(traced.build("cpu"), *traced.example("cpu"))
    assert show.flops(formulas.work(op, graph) for op in graph.ops) == forward
    work = [w for op in graph.ops for w in backward.work(op, graph, kernels="cpu")]
    assert show.flops(work) - recomputed(graph) == back


def test_the_same_holds_on_meta_where_no_memory_is_taken(subject):
    traced = subject("zoo:gpt-tiny")
    forward, back = counted(traced.build("meta"), *traced.example("meta"))
    assert show.flops(formulas.work(op, traced.graph) for op in traced.graph.ops) == forward
    work = [w for op in traced.graph.ops for w in backward.work(op, traced.graph)]
    assert show.flops(work) - recomputed(traced.graph) == back


def test_a_first_layers_input_needs_no_gradient():
    module = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    graph = ir.trace(module, (torch.zeros(3, 8),), name="mlp")
    first, second = graph.ops
    products = [[w for w in backward.work(op, graph) if w.op_class == "matmul"] for op in graph.ops]
    assert [len(works) for works in products] == [1, 2]
    assert products[0][0].flops == formulas.work(first, graph).flops
    frozen = module.requires_grad_(False)
    graph = ir.trace(frozen, (torch.zeros(3, 8),), name="mlp")
    assert not graph.differentiated
    assert backward.work(second, graph) == ()


def test_a_tensor_read_twice_has_its_gradients_added():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4))

        def forward(self, x):
            return x @ self.weight + (x + 1) @ self.weight

    graph = ir.trace(Model(), (torch.zeros(3, 4),), name="model")
    added = [w for op in graph.ops for w in backward.work(op, graph)
             if op.kind == "aten.matmul" and w.op_class == "elementwise"]  # fmt: skip
    assert added == [Work("elementwise", 16.0, 128.0, 64.0)]


def test_fused_attention_counts_what_torch_counts_for_its_kernels():
    from torch.utils.flop_counter import sdpa_backward_flop_count

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, q, k):
            q, k = q * self.scale, k * self.scale
            return nn.functional.scaled_dot_product_attention(q, k, k)

    q, k = torch.zeros(2, 4, 16, 8), torch.zeros(2, 4, 32, 8)
    graph = ir.trace(Model(), (q, k), name="model", axes={})
    (op,) = [op for op in graph.ops if op.kind == ATTENTION]
    flash = flop_registry[torch.ops.aten._scaled_dot_product_flash_attention]
    assert flash is not None
    assert formulas.work(op, graph).flops == sdpa_flop(q.shape, k.shape, k.shape)
    attention = [w for w in backward.work(op, graph) if w.op_class == "attention"]
    assert attention[0].flops == sdpa_backward_flop_count(q.shape, q.shape, k.shape, k.shape)


_dims = st.integers(1, 5)
_FORMS = ["mm", "bmm", "matmul", "addmm", "baddbmm", "einsum", "linear", "conv1d", "conv2d"]


@settings(max_examples=25, deadline=None)
@given(b=_dims, m=_dims, k=_dims, n=_dims, form=st.sampled_from(_FORMS))
def test_products_of_any_shape_equal_flop_counter(b, m, k, n, form):
    class Model(nn.Module):
        def forward(self, x, y, z):
            f = nn.functional
            return {
                "mm": lambda: torch.mm(x[0], y[0]),
                "bmm": lambda: torch.bmm(x, y),
                "matmul": lambda: torch.matmul(x, y[0]),
                "addmm": lambda: torch.addmm(z[0], x[0], y[0]),
                "baddbmm": lambda: torch.baddbmm(z, x, y),
                "einsum": lambda: torch.einsum("bmk,bkn->bmn", x, y),
                "linear": lambda: f.linear(x, y[0].T),
                "conv1d": lambda: f.conv1d(x.transpose(1, 2), y.permute(2, 1, 0)[:, :, :1]),
                "conv2d": lambda: f.conv2d(x[None].permute(0, 3, 1, 2),
                                           y.permute(2, 1, 0)[:, :, :1, None], padding=1),
            }[form]()  # fmt: skip

    inputs = (torch.zeros(b, m, k), torch.zeros(b, k, n), torch.zeros(b, m, n))
    graph = ir.trace(Model(), inputs, name="product", axes={})
    with FlopCounterMode(display=False) as counter:
        Model()(*inputs)
    expected = counter.get_total_flops()
    if form == "einsum":  # with a dim of size 1 torch multiplies elementwise, which nobody counts
        expected = 2.0 * b * m * k * n
    assert show.flops(formulas.work(op, graph) for op in graph.ops) == expected


def test_bytes_are_each_distinct_input_once_and_each_output_once():
    class Model(nn.Module):
        def forward(self, x, row):
            return x * x + row.expand(64, 32)

    graph = ir.trace(Model(), (torch.zeros(64, 32), torch.zeros(1, 32)), name="model", axes={})
    works = {op.kind: formulas.work(op, graph) for op in graph.ops}
    assert works["aten.mul"].read_bytes == 64 * 32 * 4
    assert works["aten.expand"].op_class == "view"
    # An expanded tensor is read for what it holds, not for what it looks like.
    assert works["aten.add"].read_bytes == 64 * 32 * 4 + 32 * 4
    assert works["aten.add"].write_bytes == 64 * 32 * 4


def test_views_move_nothing_and_copies_do():
    class Model(nn.Module):
        def forward(self, x):
            y = x.view(4, 8, 16).transpose(1, 2)
            return y.reshape(4, 128), y.reshape(4, 16, 8), y.contiguous(), x.to(torch.float64)

    graph = ir.trace(Model(), (torch.zeros(4, 128),), name="model", axes={})
    classes = [formulas.work(op, graph).op_class for op in graph.ops]
    assert classes == ["view", "view", "copy", "view", "copy", "copy"]


def test_gathers_read_the_rows_they_need():
    table = nn.Embedding(1000, 16)
    graph = ir.trace(table, (torch.zeros(2, 3, dtype=torch.long),), name="table")
    assert formulas.work(graph.ops[0], graph) == Work("gather", 0.0, 6 * 16 * 4 + 6 * 8, 6 * 16 * 4)


def test_einsum_labels_write_ellipses_out():
    labels, result = einsum.labels("...qc,...kc->...qk", [4, 3])
    assert [len(text) for text in labels] == [4, 3]
    assert labels[0][1] == labels[1][0]
    assert result == labels[0][:2] + "qk"
