"""Tracing loses nothing: a graph, run operator by operator, gives the model's own output."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from toolkit import ir
from toolkit.cost.work import Work
from toolkit.errors import FormatError, ToolkitError, UsageError
from toolkit.ir import backward, dims, formulas, interpret, saved


def _first(output):
    leaves = torch.utils._pytree.tree_leaves(output)
    return next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


@pytest.mark.parametrize(
    "name", ["zoo:gpt-tiny", "zoo:llama-tiny", "zoo:swin-nano", "zoo:t5-tiny",
             "zoo:evoformer-tiny", "hf:llama", "hf:qwen2", "hf:swin", "hf:vit"]
)  # fmt: skip
def test_a_graph_run_gives_the_models_output(subject, name):
    traced = subject(name)
    module = traced.build("cpu")
    args, kwargs = traced.example("cpu")
    tensors = {**interpret.weights(traced.graph, module), **traced.tensors(args, kwargs)}
    torch.manual_seed(0)
    with torch.no_grad():
        found = interpret.run(traced.graph, tensors)[0]
        torch.manual_seed(0)
        expected = _first(module(*args, **kwargs))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_every_operator_keeps_its_module_and_source(traced):
    module = traced.build("meta")
    paths = {name for name, _ in module.named_modules()}
    for op in traced.graph.ops:
        assert op.module_path in paths
        assert op.name.startswith(f"{op.module_path}:")
        assert ":" in op.source
        assert not op.source.startswith("/")
    for path, kind in traced.graph.modules.items():
        assert type(module.get_submodule(path)).__name__ == kind


def test_parameters_are_the_modules_own_each_once(traced):
    module = traced.build("meta")
    expected = {name: tuple(p.shape) for name, p in module.named_parameters()}
    found = {tensor.fqn: tensor.shape for tensor in traced.graph.parameters()}
    assert found == expected
    assert all(t.requires_grad for t in traced.graph.parameters())


def test_tied_weights_are_one_tensor(subject):
    graph = subject("hf:gpt2").graph
    assert graph.tied == {"lm_head.weight": "transformer.wte.weight"}
    readers = [op.name for op in graph.consumers["transformer.wte.weight"]]
    assert readers == ["transformer.wte:embedding", "lm_head:linear"]


def test_the_networkx_view_is_acyclic_and_labelled(subject):
    import networkx as nx

    graph = subject("zoo:gpt-tiny").graph
    made = graph.networkx
    assert nx.is_directed_acyclic_graph(made)
    assert sum(data["kind"] == "op" for _, data in made.nodes(data=True)) == len(graph.ops)
    for tail, head, data in made.edges(data=True):
        assert set(data["tensors"]) <= set(made.nodes[head]["op"].inputs)
        source = made.nodes[tail]
        known = source["op"].outputs if source["kind"] == "op" else (tail,)
        assert set(data["tensors"]) <= set(known)


def test_an_unknown_operator_is_an_error_that_says_where_and_what_to_do():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.erfinv(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd = Odd()

        def forward(self, x):
            return self.odd(x) + 1

    with pytest.raises(ToolkitError) as caught:
        ir.trace(Model(), (torch.zeros(2, 3),), name="model")
    message = str(caught.value)
    assert "aten.erfinv.default" in message
    assert "odd (Odd)" in message
    assert "test_trace.py" in message
    assert "docs/howto/add-an-op.md" in message


def test_every_formula_is_reachable_and_no_unknown_operator_is_free(subject):
    graph = subject("zoo:gpt-tiny").graph
    op = graph.ops[0]
    stranger = ir.Op(**{**{f: getattr(op, f) for f in op.__dataclass_fields__},
                        "target": "aten.nobody_knows.default"})  # fmt: skip
    with pytest.raises(ToolkitError, match="nobody_knows"):
        formulas.work(stranger, graph)
    assert not dims.annotation(stranger, graph).known


def test_an_operator_of_ones_own_needs_its_rules_and_no_more():
    @torch.library.custom_op("toolkit_test::fused_mlp", mutates_args=())
    def fused_mlp(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ up) @ down

    @fused_mlp.register_fake
    def _(x, up, down):
        return x.new_empty(*x.shape[:-1], down.shape[1])

    fused_mlp.register_autograd(
        lambda ctx, grad: (grad @ ctx.saved_tensors[0], None, None),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
    )

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Parameter(torch.zeros(4, 8)), nn.Parameter(torch.zeros(8, 4))

        def forward(self, x):
            return fused_mlp(x * 2, self.up, self.down)

    kind = "toolkit_test.fused_mlp"
    with pytest.raises(ToolkitError, match=f"operator {kind}.default"):
        ir.trace(Model(), (torch.zeros(3, 4),), name="model")

    @formulas.formula(kind)
    def work(op, graph):
        x, up, down = graph.input_tensors(op)
        moved = x.num_bytes + up.num_bytes + down.num_bytes
        flops = 2.0 * x.numel * up.shape[1] + 2.0 * 3 * down.numel
        return Work("matmul", flops, moved, graph.tensors[op.outputs[0]].num_bytes, x.dtype)

    saved.rule(kind)(saved.from_text("x"))
    graph = ir.trace(Model(), (torch.zeros(3, 4),), name="model")
    assert formulas.work(graph.ops[-1], graph).flops == 2 * 3 * 4 * 8 * 2
    assert [kept.name for kept in saved.saved(graph)] == [":mul"]
    assert len(backward.work(graph.ops[-1], graph)) == 1
    assert not dims.annotation(graph.ops[-1], graph).known


def test_data_dependent_shapes_are_refused():
    class Model(nn.Module):
        def forward(self, x):
            return x[x > 0]

    with pytest.raises(ToolkitError, match="depends on the data"):
        ir.trace(Model(), (torch.zeros(4, 3),), name="model")


def test_writes_in_place_reach_every_later_reader():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            y = self.linear(x)
            z = torch.zeros(x.shape[0], 4)
            w = z[:, 1:]
            w.add_(1.0)
            v = z * 2
            z[:, 0].fill_(7.0)
            w.mul_(3.0)
            return z + y.relu_(), w, v

    module, x = Model(), torch.randn(5, 4)
    graph = ir.trace(module, (torch.zeros(3, 4),), name="model").at(batch=5)
    found = interpret.run(graph, {**interpret.weights(graph, module), "x": x})
    assert all(torch.equal(a, b) for a, b in zip(found, module(x), strict=True))


def test_no_grad_and_autocast_regions_are_inlined_and_marked():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                scale = self.linear(x).sigmoid()
            with torch.autocast("cpu", torch.bfloat16):
                y = self.linear(x)
            return y.float() * scale

    module, x = Model(), torch.randn(2, 4)
    graph = ir.trace(module, (x,), name="model")
    first, sigmoid, second, *_ = graph.ops
    assert (first.grad_enabled, sigmoid.grad_enabled, second.grad_enabled) == (False, False, True)
    assert (first.autocast, second.autocast) == ("", "bfloat16")
    assert first.name not in graph.differentiated
    assert second.name in graph.differentiated
    assert formulas.work(second, graph).dtype == "bfloat16"
    found = interpret.run(graph, {**interpret.weights(graph, module), "x": x})
    assert torch.equal(found[0], module(x))


def test_a_model_that_needs_a_real_device_traces_from_meta():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            with torch.autocast(x.device.type, enabled=False):
                return self.linear(x)

    with torch.device("meta"):
        module = Model()
    graph = ir.trace(module, (torch.zeros(2, 4, device="meta"),), name="model")
    assert [op.target for op in graph.ops] == ["aten.linear.default"]


def test_dropout_follows_the_mode_the_module_is_in():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(x)

    x = torch.zeros(4, 4)
    training = ir.trace(Model().train(), (x,), name="model")
    evaluating = ir.trace(Model().eval(), (x,), name="model")
    assert formulas.work(training.ops[0], training).write_bytes == 64
    assert formulas.work(evaluating.ops[0], evaluating).op_class == "view"
    assert (training.training, evaluating.training) == (True, False)


def test_wrong_inputs_and_names_are_told():
    with pytest.raises(UsageError, match="cannot be called with these inputs"):
        ir.trace(nn.Linear(2, 2), (), name="linear")
    with pytest.raises(UsageError, match="model input"):
        ir.trace(nn.Linear(2, 2), (torch.zeros(3, 2),), name="linear", axes={"batch": {"x": 0}})
    with pytest.raises(UsageError, match="no dim 5"):
        ir.trace(nn.Linear(2, 2), (torch.zeros(3, 2),), name="l", axes={"batch": {"input": 5}})


def test_a_graph_whose_parts_do_not_fit_is_refused(subject):
    graph = subject("zoo:gpt-tiny").graph
    fields = {name: getattr(graph, name) for name in graph.__dataclass_fields__}
    with pytest.raises(FormatError, match="which nothing before it makes"):
        ir.OpGraph(**{**fields, "ops": graph.ops[::-1]})
    with pytest.raises(FormatError, match="occurs twice"):
        ir.OpGraph(**{**fields, "ops": (*graph.ops, graph.ops[-1])})
