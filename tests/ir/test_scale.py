"""A graph evaluated at other sizes is the graph a fresh trace at those sizes gives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from toolkit import ir, models
from toolkit.cost.work import total
from toolkit.errors import FormatError, UsageError
from toolkit.ir import formulas, scale, show
from toolkit.ir.formulas import ATTENTION


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("gpt-tiny", {"batch": 3, "tokens": 48}),
        ("gpt-tiny", {"batch": 1, "tokens": 7}),
        ("llama-tiny", {"batch": 5, "tokens": 11}),
        ("swin-nano", {"batch": 5}),
        ("t5-tiny", {"batch": 3, "tokens": 9, "source_tokens": 21}),
        pytest.param("evoformer-tiny", {"batch": 3, "tokens": 10, "sequences": 5},
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_the_zoo_scales_to_exactly_what_a_fresh_trace_gives(subject, name, sizes):
    graph = subject(f"zoo:{name}").graph
    if not graph.sizes:
        graph = ir.trace_model(models.load(name), batch=2)
    scaled = graph.at(**sizes)
    fresh = ir.trace_model(models.load(name), **sizes)
    assert scaled.tensors == fresh.tensors
    assert scaled.ops == fresh.ops
    assert scaled.digest == fresh.digest


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_transformers_models_scale_too(subject, name):
    traced = subject(f"hf:{name}")
    ids = torch.zeros(5, 40, dtype=torch.long, device="meta")
    fresh = ir.trace(traced.build("meta"), (), {"input_ids": ids}, name=name)
    scaled = traced.graph.at(batch=5, tokens=40)
    assert scaled.tensors == fresh.tensors
    assert scaled.ops == fresh.ops


def test_a_size_of_one_in_the_example_still_scales():
    graph = ir.trace_model(models.load("gpt-tiny"), batch=1, tokens=8)
    assert graph.sizes == {"batch": 1, "tokens": 8}
    assert graph.at(batch=4).sizes["batch"] == 4


def test_what_cannot_vary_says_why():
    class Model(nn.Module):
        def forward(self, x):
            return x * (1.0 if x.shape[0] == 4 else 2.0)

    graph = ir.trace(Model(), (torch.zeros(4, 3),), name="model")
    with pytest.raises(UsageError, match=r"batch=8: the model's code depends on its value"):
        graph.at(batch=8)
    assert graph.at(batch=4) is graph
    one = ir.trace(nn.Linear(3, 3), (torch.zeros(1, 3),), name="model")
    with pytest.raises(UsageError, match="was 1 in the traced example"):
        one.at(batch=8)


def test_an_input_may_have_a_size_in_several_dims():
    class Model(nn.Module):
        def forward(self, pairs):
            return pairs.sum(1)

    pairs = torch.zeros(2, 6, 6)
    graph = ir.trace(
        Model(), (pairs,), name="pairs", axes={"batch": {"pairs": 0}, "tokens": {"pairs": (1, 2)}}
    )
    scaled = graph.at(batch=3, tokens=9)
    assert [scaled.tensors[name].shape for name in ("pairs", *scaled.outputs)] == [
        (3, 9, 9),
        (3, 9),
    ]
    with pytest.raises(UsageError, match="disagree about tokens"):
        ir.trace(Model(), (pairs,), name="pairs", axes={"tokens": {"pairs": (0, 1)}})


def test_unknown_and_impossible_sizes_are_errors(subject):
    graph = subject("zoo:gpt-tiny").graph
    with pytest.raises(UsageError, match="did you mean 'batch'"):
        graph.at(batches=3)
    with pytest.raises(UsageError, match="1 or more"):
        graph.at(batch=0)


def test_bounds_the_model_sets_are_kept(subject):
    # BERT slices a table of 512 positions: export knows it cannot be called with more.
    with pytest.raises(UsageError, match=r"tokens=513 is outside .*1 to 512"):
        subject("hf:bert").graph.at(tokens=513)


def test_sizes_that_do_not_fit_are_found_out():
    class Model(nn.Module):
        def forward(self, x):
            return x.view(x.shape[0] // 4, 4, 3)

    graph = ir.trace(Model(), (torch.zeros(8, 3),), name="model")
    assert graph.at(batch=12).tensors[graph.outputs[0]].shape == (3, 4, 3)
    with pytest.raises(UsageError, match="batch=10"):
        graph.at(batch=10)


def test_context_equal_to_tokens_changes_nothing(subject):
    graph = subject("zoo:llama-tiny").graph
    assert graph.at(tokens=16, context=16) == graph.at(tokens=16)


@pytest.mark.parametrize("name", ["zoo:gpt-tiny", "zoo:llama-tiny", "hf:llama", "hf:qwen2"])
def test_a_decoding_step_reads_the_cache_and_computes_new_tokens_only(subject, name):
    graph = subject(name).graph.at(batch=3, tokens=1, context=100)
    attention = [op for op in graph.ops if op.kind == ATTENTION]
    assert attention
    for op in attention:
        query, key, value = (formulas.tensor_of(op, graph, n) for n in ("query", "key", "value"))
        assert (query.shape[2], key.shape[2], value.shape[2]) == (1, 100, 100)
        work = formulas.work(op, graph)
        assert work.flops == 4.0 * query.numel * 100
        assert work.read_bytes == query.num_bytes + key.num_bytes + value.num_bytes
    one = subject(name).graph.at(batch=3, tokens=1)
    products = [op for op in graph.ops if formulas.work(op, graph).op_class == "matmul"]
    for op in products:
        assert formulas.work(op, graph) == formulas.work(one.op(op.name), one)
    appended = [op for op in graph.ops if op.kind == "toolkit.extend"]
    assert len(appended) == 2 * len(attention)
    assert all(formulas.work(op, graph).moved_bytes < 4000 for op in appended)


def test_prefill_in_chunks_costs_what_the_whole_does(subject):
    def flops(graph: ir.OpGraph, kind: str = "") -> float:
        return show.flops(formulas.work(op, graph) for op in graph.ops if kind in op.kind)

    graph = subject("zoo:gpt-tiny").graph
    whole = graph.at(batch=1, tokens=32)
    chunks = [graph.at(batch=1, tokens=8, context=context) for context in (8, 16, 24, 32)]
    # The whole counts every pair of positions, the chunks only those up to their end.
    unseen = flops(whole, ATTENTION) * (1 - (8 + 16 + 24 + 32) / (4 * 32))
    assert sum(map(flops, chunks)) == flops(whole) - unseen


def test_context_is_evaluated_again_and_saved(subject, tmp_path):
    graph = subject("zoo:llama-tiny").graph.at(tokens=1, context=64)
    graph.save(tmp_path / "step.json")
    again = ir.OpGraph.load(tmp_path / "step.json")
    assert again == graph
    more = again.at(context=128)
    assert (
        total(formulas.work(op, more) for op in more.ops).read_bytes
        > total(formulas.work(op, graph) for op in graph.ops).read_bytes
    )
    with pytest.raises(UsageError, match="context counts the new tokens too"):
        again.at(tokens=200)


def test_a_model_without_fused_attention_has_no_context_of_its_own(subject):
    class Model(nn.Module):
        def forward(self, ids):
            x = ids[..., None].float()
            return (x @ x.transpose(1, 2)).softmax(-1) @ x

    graph = ir.trace(Model(), (torch.zeros(2, 8, dtype=torch.long),), name="model")
    with pytest.raises(UsageError, match="none of its operators is a"):
        graph.at(tokens=1, context=8)
    with pytest.raises(UsageError, match="size of swin"):
        subject("zoo:swin-nano").graph.at(context=8)


def test_causal_masks_and_repeated_heads_run_as_they_do_eagerly(subject):
    for op in subject("hf:llama").graph.ops:
        if op.kind == ATTENTION:
            assert op.arguments["is_causal"]
            assert op.arguments["enable_gqa"]
            assert op.arguments["attn_mask"] is None
    # A sliding window is not causal, however short the example was.
    import transformers

    with torch.device("meta"):
        module = transformers.MistralForCausalLM(
            transformers.MistralConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1,
                                       num_key_value_heads=2, intermediate_size=64, vocab_size=100,
                                       sliding_window=16)
        )  # fmt: skip
    module.config.use_cache = False
    ids = torch.zeros(2, 8, dtype=torch.long, device="meta")
    graph = ir.trace(module, (), {"input_ids": ids}, name="mistral")
    (op,) = [op for op in graph.ops if op.kind == ATTENTION]
    assert not op.arguments["is_causal"]


_sizes = st.dictionaries(st.sampled_from(["batch", "tokens"]), st.integers(1, 99), min_size=2)


@given(sizes=_sizes)
def test_expressions_are_pythons_own_arithmetic(sizes):
    for text in ("batch*tokens", "(tokens + 3)//4", "-(-(tokens)//(7))*batch", "tokens**2 % 5",
                 "max(batch, tokens) - min(batch, 4)", "ceil((tokens)/(3))"):  # fmt: skip
        names = {"max": max, "min": min, "ceil": math.ceil}
        assert scale.evaluate(text, sizes) == eval(text, {**names, **sizes})


@pytest.mark.parametrize("text", ["__import__('os')", "tokens.real", "other", "tokens if 1 else 2",
                                  "(tokens", "open(1)"])  # fmt: skip
def test_an_expression_is_never_code(text):
    with pytest.raises(FormatError):
        scale.evaluate(text, {"tokens": 3})
