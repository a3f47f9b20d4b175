"""Our modules compute what the reference implementations compute, with the same weights."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from toolkit import models
from toolkit.models import evoformer, gpt, llama, swin, t5

transformers = pytest.importorskip("transformers")

BATCH, TOKENS, VOCAB = 2, 17, 61


def draw(module):
    """Give every parameter its own random value: norms and biases too, so that none hides."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return module.eval()


def copy(ours, theirs, pairs):
    """Copy parameters, ours <- theirs, by module (or parameter) path; all of ours must be given."""
    given = set()
    with torch.no_grad():
        for to, source in pairs.items():
            for name, parameter in ours.get_submodule(to).named_parameters(recurse=False):
                single = source in dict(theirs.named_parameters())
                parameter.copy_(theirs.get_parameter(source if single else f"{source}.{name}"))
                given.add(id(parameter))
    missing = [path for path, each in ours.named_parameters() if id(each) not in given]
    assert missing == []


def ids(tokens=TOKENS, seed=0):
    return torch.randint(VOCAB, (BATCH, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_llama(kind):
    numbers = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    }
    if kind == "llama":
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**numbers))
    else:
        theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**numbers))
    draw(theirs)
    config = llama.Config(2, 48, 6, 2, 8, 80, VOCAB, 64, 5000.0, "", qkv_bias=kind == "qwen2")
    ours = llama.build(config)
    pairs = {"token_embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
    for layer in range(2):
        block, other = f"blocks.{layer}", f"model.layers.{layer}"
        pairs |= {
            f"{block}.attention_norm": f"{other}.input_layernorm",
            f"{block}.attention.query": f"{other}.self_attn.q_proj",
            f"{block}.attention.key": f"{other}.self_attn.k_proj",
            f"{block}.attention.value": f"{other}.self_attn.v_proj",
            f"{block}.attention.output": f"{other}.self_attn.o_proj",
            f"{block}.ffn_norm": f"{other}.post_attention_layernorm",
            f"{block}.ffn.gate": f"{other}.mlp.gate_proj",
            f"{block}.ffn.up": f"{other}.mlp.up_proj",
            f"{block}.ffn.down": f"{other}.mlp.down_proj",
        }
    copy(ours, theirs, pairs)
    tokens = ids()
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    loss = theirs(tokens, labels=tokens).loss
    torch.testing.assert_close(ours(tokens[:, :-1], tokens[:, 1:]), loss, rtol=1e-5, atol=1e-5)


def test_gpt2():
    theirs = draw(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCAB, n_positions=32, n_embd=48, n_layer=2, n_head=4,
                bos_token_id=0, eos_token_id=0,
            )
        )
    )  # fmt: skip
    ours = gpt.build(gpt.Config(2, 48, 4, VOCAB, 32, True, ""))
    with torch.no_grad():
        # transformers keeps GPT-2's weights transposed and its three projections as one.
        for layer in range(2):
            block, other = ours.blocks[layer], theirs.transformer.h[layer]
            attention, ffn = block.attention, block.ffn
            parts = (attention.query, attention.key, attention.value)
            weights = other.attn.c_attn.weight.T.chunk(3)
            for part, weight, bias in zip(
                parts, weights, other.attn.c_attn.bias.chunk(3), strict=True
            ):
                part.weight.copy_(weight)
                part.bias.copy_(bias)
            for to, source in (
                (attention.output, other.attn.c_proj),
                (ffn.up, other.mlp.c_fc),
                (ffn.down, other.mlp.c_proj),
            ):
                to.weight.copy_(source.weight.T)
                to.bias.copy_(source.bias)
            block.attention_norm.load_state_dict(other.ln_1.state_dict())
            block.ffn_norm.load_state_dict(other.ln_2.state_dict())
        ours.token_embedding.load_state_dict(theirs.transformer.wte.state_dict())
        ours.position_embedding.load_state_dict(theirs.transformer.wpe.state_dict())
        ours.final_norm.load_state_dict(theirs.transformer.ln_f.state_dict())
    tokens = ids()
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_swin():
    theirs = draw(
        transformers.SwinForImageClassification(
            transformers.SwinConfig(
                image_size=64, patch_size=4, embed_dim=16, depths=[2, 2, 2], num_heads=[2, 4, 8],
                window_size=4, num_labels=7,
            )
        )
    )  # fmt: skip
    ours = swin.build(swin.Config(64, 4, (2, 2, 2), 16, 2, "", num_labels=7))
    pairs = {
        "patches": "swin.embeddings.patch_embeddings.projection",
        "patch_norm": "swin.embeddings.norm",
        "final_norm": "swin.layernorm",
        "head": "classifier",
    }
    at = 0
    for stage in range(3):
        for depth in range(2):
            block, other = f"blocks.{at}", f"swin.encoder.layers.{stage}.blocks.{depth}"
            pairs |= {
                f"{block}.attention_norm": f"{other}.layernorm_before",
                f"{block}.attention.query": f"{other}.attention.q_proj",
                f"{block}.attention.key": f"{other}.attention.k_proj",
                f"{block}.attention.value": f"{other}.attention.v_proj",
                f"{block}.attention.output": f"{other}.attention.o_proj",
                f"{block}.attention.position_bias": f"{other}.attention.relative_position_bias"
                ".relative_position_bias_table",
                f"{block}.ffn_norm": f"{other}.layernorm_after",
                f"{block}.ffn.up": f"{other}.mlp.fc1",
                f"{block}.ffn.down": f"{other}.mlp.fc2",
            }
            at += 1
        if stage < 2:
            merging = f"swin.encoder.layers.{stage}.downsample"
            pairs |= {f"blocks.{at}.norm": f"{merging}.norm"}
            pairs |= {f"blocks.{at}.reduce": f"{merging}.reduction"}
            at += 1
    copy(ours, theirs, pairs)
    image = torch.randn(BATCH, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(image), theirs(image).logits, rtol=1e-4, atol=1e-4)


def test_t5():
    theirs = draw(
        transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=VOCAB, d_model=48, d_kv=8, d_ff=192, num_layers=2, num_heads=6,
                dropout_rate=0.0, decoder_start_token_id=0,
            )
        )
    )  # fmt: skip
    ours = t5.build(t5.Config(2, 48, 6, VOCAB, "", head_dim=8))
    pairs = {"embedding": "shared"}
    for stack in ("encoder", "decoder"):
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
        pairs |= {f"{stack}.position_bias.table": first}
        pairs |= {f"{stack}.final_norm": f"{stack}.final_layer_norm"}
        for layer in range(2):
            block, other = f"{stack}.blocks.{layer}", f"{stack}.block.{layer}.layer"
            parts = {"attention": (0, "SelfAttention")}
            if stack == "decoder":
                parts |= {"cross": (1, "EncDecAttention")}
            for name, (at, theirs_name) in parts.items():
                pairs |= {f"{block}.{name}_norm": f"{other}.{at}.layer_norm"}
                for part in ("query", "key", "value", "output"):
                    pairs |= {f"{block}.{name}.{part}": f"{other}.{at}.{theirs_name}.{part[0]}"}
            last = len(parts)
            pairs |= {f"{block}.ffn_norm": f"{other}.{last}.layer_norm"}
            pairs |= {f"{block}.ffn.up": f"{other}.{last}.DenseReluDense.wi"}
            pairs |= {f"{block}.ffn.down": f"{other}.{last}.DenseReluDense.wo"}
    copy(ours, theirs, pairs)
    # Longer than the largest exact distance and than the largest told apart.
    source, target = ids(200, seed=1), ids(150, seed=2)
    expected = theirs(input_ids=source, decoder_input_ids=target).logits
    torch.testing.assert_close(ours(source, target), expected, rtol=1e-4, atol=1e-4)


def test_t5_decoder_sees_the_past_and_the_encoder_everything():
    module = models.load("t5-tiny").build("cpu")
    source, target = ids(9, seed=1), ids(9, seed=2)
    later, other = target.clone(), source.clone()
    later[:, 5] += 1
    other[:, 8] += 1
    first = module(source, target)
    assert torch.equal(first[:, :5], module(source, later)[:, :5])
    assert not torch.equal(first[:, 5:], module(source, later)[:, 5:])
    assert (first != module(other, target)).any(dim=-1).all()


def make_pair(config, residues=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, residues, residues, config.pair_dim, generator=generator)


EVOFORMER = models.load("evoformer-tiny").config


@pytest.mark.parametrize("outgoing", [True, False])
def test_triangle_multiplication_is_the_papers_sum(outgoing):
    module = draw(evoformer.TriangleMultiplication(EVOFORMER, outgoing=outgoing))
    pair = make_pair(EVOFORMER)
    z = module.norm(pair)
    a = module.left_gate(z).sigmoid() * module.left(z)
    b = module.right_gate(z).sigmoid() * module.right(z)
    rule = "bikc,bjkc->bijc" if outgoing else "bkic,bkjc->bijc"
    summed = module.output(module.hidden_norm(torch.einsum(rule, a, b)))
    expected = module.gate(z).sigmoid() * summed
    torch.testing.assert_close(module(pair), expected, rtol=1e-4, atol=1e-4)


def test_outer_product_mean_is_the_papers_mean():
    module = draw(evoformer.OuterProductMean(EVOFORMER))
    msa = torch.randn(BATCH, 5, 6, EVOFORMER.msa_dim, generator=torch.Generator().manual_seed(0))
    m = module.norm(msa)
    outer = torch.einsum("bsic,bsjd->bijcd", module.left(m), module.right(m)) / 5
    expected = module.output(outer.flatten(-2))
    torch.testing.assert_close(module(msa), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("starting", [True, False])
def test_triangle_attention_is_the_papers(starting):
    """Algorithms 13 and 14, written for one edge (i, j) at a time."""
    module = draw(evoformer.TriangleAttention(EVOFORMER, starting=starting))
    pair = make_pair(EVOFORMER, residues=4)
    inner = module.attention
    size = EVOFORMER.head_dim
    bias_source = module.norm(pair)
    z = inner.norm(pair)
    q, k, v = (part(z).unflatten(-1, (-1, size)) for part in (inner.query, inner.key, inner.value))
    bias = inner.bias(bias_source)
    gate = inner.gate(z).sigmoid()
    expected = torch.empty_like(pair)
    for i in range(4):
        for j in range(4):
            # Starting: over edges (i, k), biased by (j, k). Ending: over (k, j), biased by (k, i).
            keys, values = (k[:, i], v[:, i]) if starting else (k[:, :, j], v[:, :, j])
            extra = bias[:, j] if starting else bias[:, :, i]
            scores = torch.einsum("bhc,bkhc->bkh", q[:, i, j], keys) * size**-0.5 + extra
            mixed = torch.einsum("bkh,bkhc->bhc", scores.softmax(dim=1), values).flatten(1)
            expected[:, i, j] = inner.output(gate[:, i, j] * mixed)
    torch.testing.assert_close(module(pair), expected, rtol=1e-4, atol=1e-4)


def test_msa_row_attention_is_biased_by_the_pair():
    module = draw(evoformer.MsaRowAttention(EVOFORMER))
    msa = torch.randn(BATCH, 3, 6, EVOFORMER.msa_dim, generator=torch.Generator().manual_seed(0))
    pair = make_pair(EVOFORMER)
    inner, size = module.attention, EVOFORMER.head_dim
    m = inner.norm(msa)
    q, k, v = (part(m).unflatten(-1, (-1, size)) for part in (inner.query, inner.key, inner.value))
    scores = torch.einsum("bsihc,bsjhc->bshij", q, k) * size**-0.5
    scores = scores + inner.bias(module.pair_norm(pair)).permute(0, 3, 1, 2)[:, None]
    mixed = torch.einsum("bshij,bsjhc->bsihc", scores.softmax(-1), v).flatten(-2)
    expected = inner.output(inner.gate(m).sigmoid() * mixed)
    torch.testing.assert_close(module(msa, pair), expected, rtol=1e-4, atol=1e-4)


def test_recycling_takes_gradients_from_the_last_pass_alone():
    model = models.load("evoformer-tiny")
    (rows, *labels), _ = model.example(1, device="cpu")
    module = draw(model.build("cpu"))
    module(rows, *labels).backward()
    recycled = {path: each.grad.clone() for path, each in module.named_parameters()}
    # The same, by hand: two passes thrown away, one kept.
    module.zero_grad()
    previous = module.nothing_yet(rows)
    for _ in range(2):
        msa, pair = module.one_pass(rows, previous)
        previous = (msa[:, 0].detach(), pair.detach())
    msa, pair = module.one_pass(rows, previous)
    residue, distance = module.residue_head(module.final_norm(msa)), module.distance_head(pair)
    distance = distance + distance.transpose(1, 2)
    losses = [
        cross_entropy(logits.flatten(0, 2), wanted.flatten())
        for logits, wanted in zip((residue, distance), labels, strict=True)
    ]
    (2.0 * losses[0] + 0.3 * losses[1]).backward()
    for path, parameter in module.named_parameters():
        torch.testing.assert_close(recycled[path], parameter.grad, msg=path)
    # And the number of passes matters to the result.
    once = evoformer.build(models.load("evoformer-tiny", num_passes=1).config)
    once.load_state_dict(module.state_dict())
    assert not torch.allclose(once(rows)[0], module(rows)[0])
