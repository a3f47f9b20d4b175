from __future__ import annotations

import pytest

from toolkit.errors import InfeasibleError
from toolkit.ir import formulas
from toolkit.plan import chain, subject, transform


def regions(traced, degree: int = 2):
    return transform.regions(traced.graph, chain.segments(traced.graph), degree)


def test_gpt_has_an_attention_and_a_feed_forward_region_in_each_block(tiny) -> None:
    found = regions(tiny)
    assert [(region.columns, region.row) for region in found[:2]] == [
        (
            tuple(f"blocks.0.attention.{name}" for name in ("query", "key", "value")),
            "blocks.0.attention.output",
        ),
        (("blocks.0.ffn.up",), "blocks.0.ffn.down"),
    ]
    assert len(found) == 8
    assert [region.largest_degree for region in found[:2]] == [4, 512]
    assert [region.repeated for region in found[:2]] == [True, False]


def test_llama_is_limited_by_its_key_value_heads() -> None:
    traced = subject.load("llama-tiny", batch=2, tokens=16)
    attention, ffn = regions(traced)[:2]
    assert attention.largest_degree == 2
    assert set(ffn.columns) == {"blocks.0.ffn.gate", "blocks.0.ffn.up"}
    with pytest.raises(InfeasibleError, match="use a degree of 1, 2"):
        regions(traced, 4)


def test_a_degree_that_does_not_divide_says_which_do(tiny) -> None:
    with pytest.raises(InfeasibleError) as caught:
        regions(tiny, 3)
    assert "degree 3 does not divide 4" in str(caught.value)
    assert "use a degree of 1, 2, 4" in str(caught.value)


def test_the_local_graph_does_its_share_of_the_split_work(tiny) -> None:
    found = regions(tiny)
    local = transform.local(tiny.graph, found, 2)
    split = {path for region in found for path in (*region.columns, region.row)}
    for op in tiny.graph.ops:
        whole = formulas.work(op, tiny.graph).flops
        part = formulas.work(op, local).flops
        if op.module_path in split or op.kind == "aten.scaled_dot_product_attention":
            assert part == whole / 2, op.name
        elif op.kind in ("aten.linear", "aten.layer_norm"):
            assert part == whole, op.name


def test_the_first_block_of_a_bare_chain_needs_no_input_gradient(toys) -> None:
    traced = subject.load("toy_models:chain", batch=4)
    assert chain.blocks(traced.graph) == tuple(f"layers.{i}" for i in range(4))
    needs = [traced.graph.tensors[region.input].requires_grad for region in regions(traced)]
    assert needs == [False, True, True, True]


def test_a_model_without_repeated_blocks_is_refused() -> None:
    import torch

    from toolkit import ir

    graph = ir.trace(torch.nn.Linear(4, 4), (torch.zeros(2, 4),), name="one linear")
    with pytest.raises(InfeasibleError, match="no repeated blocks"):
        chain.blocks(graph)
