"""Read a GGUF file: configuration from its metadata, weights as float32 or as its own blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolkit.errors import FormatError, UsageError, require, unknown_name
from toolkit.serve.model import gpt2
from toolkit.serve.model.config import DecoderConfig, check_supported
from toolkit.serve.model.grouped import Grouped, Weight, dense, from_gguf
from toolkit.serve.model.loaded import LoadedModel, check, rows_of, split
from toolkit.serve.model.part import Part

_ARCHITECTURES = ("gpt2", "llama", "qwen2", "qwen3")
# Bits a weight, with its share of the scales, of the largest type of 4 bits and of a float.
_FOUR_BITS, _HALF = 5, 16
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# What would change the computation, by what it is called after the architecture, and the values
# at which it does not.
_SUPPORTED = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "expert_count": (0,),
    "use_parallel_residual": (False,),
}
_TOP_NAMES = {
    "token_embd": "embed_tokens",
    "position_embd": "embed_positions",
    "output_norm": "norm",
    "output": "lm_head",
}


def load(path: Path, part: Part | None = None, *, keep_blocks: bool = False) -> LoadedModel:
    """Read the model in the GGUF file at `path`, or a rank's part; see weights.load."""
    gguf = require("gguf", extra="serve")
    try:
        reader = gguf.GGUFReader(path)
        fields = dict(reader.fields)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        config = _config(fields, tensors, path)
        sizes = {name: tuple(map(int, reversed(tensors[name].shape))) for name in tensors}
        parts = {
            name: split(_renamed(name, path), size[0])
            for name, size in sizes.items()
            if name != "rope_freqs.weight"
        }
        shapes = {
            new: (len(rows), *sizes[old][1:])
            for old, into in parts.items()
            for new, rows in into.items()
        }
        check(config, shapes, path)
        computed = config if part is None else part.config(config)
        weights: dict[str, Weight] = {}
        finer: set[str] = set()
        for old, into in parts.items():
            stored = _weight(gguf, tensors[old], keep_blocks)
            block, block_bytes = gguf.GGML_QUANT_SIZES[tensors[old].tensor_type]
            if _FOUR_BITS < 8 * block_bytes / block < _HALF and not isinstance(stored, Grouped):
                finer.update(into)
            for new, rows in into.items():
                whole = _arranged(new, rows_of(stored, rows), config)
                weights[new] = whole if part is None else part.of(new, dense(whole))
        if part is not None:
            weights |= part.head(config, weights)
        return LoadedModel(computed, weights, _eos_ids(fields), frozenset(finer))
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        # The reader has no error of its own: a torn file shows as whatever numpy makes of it.
        raise FormatError(
            f"{path} is not a readable GGUF file: {error}", remedy="download or copy it again"
        ) from error
    except NotImplementedError as error:
        raise UsageError(f"{path}: {error}", remedy="use another quantisation") from error


def _config(fields: dict[str, Any], tensors: dict[str, Any], path: Path) -> DecoderConfig:
    architecture = str(fields["general.architecture"].contents())
    if architecture not in _ARCHITECTURES:
        raise unknown_name(f"architecture in {path}:", architecture, _ARCHITECTURES)

    def value(name: str, default: Any = None) -> Any:
        field = fields.get(f"{architecture}.{name}")
        if field is None and default is None:
            raise FormatError(f"{path} does not state {architecture}.{name}")
        return default if field is None else field.contents()

    stated = {name: field for name in _SUPPORTED if (field := value(name, "")) != ""}
    check_supported(stated, _SUPPORTED, path)
    hidden, heads = int(value("embedding_length")), int(value("attention.head_count"))
    vocab_size = int(tensors["token_embd.weight"].shape[1])
    context = int(value("context_length"))
    if architecture == "gpt2":
        return gpt2.describe(
            num_layers=int(value("block_count")),
            hidden_size=hidden,
            num_heads=heads,
            ffn_size=int(value("feed_forward_length")),
            vocab_size=vocab_size,
            max_context=context,
            norm_eps=float(value("attention.layer_norm_epsilon")),
            tied_head="output.weight" not in tensors,
        )
    head_size = int(value("attention.key_length", hidden // heads))
    if int(value("rope.dimension_count", head_size)) != head_size:
        raise UsageError(f"{path} rotates only part of each head, which is not supported")
    return DecoderConfig(
        architecture=architecture,
        num_layers=int(value("block_count")),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=int(value("attention.head_count_kv", heads)),
        head_size=head_size,
        ffn_size=int(value("feed_forward_length")),
        vocab_size=vocab_size,
        # Within its window, sliding attention is plain attention.
        max_context=min(context, int(value("attention.sliding_window", context)) or context),
        norm_eps=float(value("attention.layer_norm_rms_epsilon")),
        rope_theta=float(value("rope.freq_base", 10000.0)),
        rope_divisors=_divisors(value, tensors, head_size, path),
        tied_head="output.weight" not in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
    )


def _divisors(
    value: Any, tensors: dict[str, Any], head_size: int, path: Path
) -> tuple[float, ...] | None:
    """Return what each rotary frequency is divided by, or None when by nothing."""
    # A factor without a type, or under its older name, is linear; 0 says that there is none.
    scaling = value("rope.scaling.type", "linear")
    factor = float(value("rope.scaling.factor", 0.0) or value("rope.scale_linear", 0.0)) or 1.0
    if scaling not in ("none", "linear"):
        raise UsageError(
            f"{path} stretches its rotary embedding by {scaling!r}, which is not supported",
            remedy="supported: none, linear, and llama 3's frequency factors",
        )
    if scaling == "none":
        factor = 1.0
    if "rope_freqs.weight" in tensors:
        return tuple(factor * float(each) for each in tensors["rope_freqs.weight"].data)
    return None if factor == 1.0 else (factor,) * (head_size // 2)


def _renamed(name: str, path: Path) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{kind}"
    block, _, inner = stem.partition(".")[2].partition(".")
    if stem.startswith("blk.") and block.isdigit() and inner in _LAYER_NAMES:
        return f"layers.{block}.{_LAYER_NAMES[inner]}.{kind}"
    raise UsageError(f"{path} holds a weight {name!r} this decoder has no use for")


def _weight(gguf: Any, tensor: Any, keep_blocks: bool) -> Weight:
    """Return a tensor as its blocks where they are kept and known, else as float32."""
    grouped = from_gguf(tensor.tensor_type.name, tensor.data) if keep_blocks else None
    if grouped is not None:
        return grouped
    return torch.from_numpy(_owned(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))


def _arranged(name: str, weight: Weight, config: DecoderConfig) -> Weight:
    """Put the rows of a Llama's query and key matrices back into halves.

    GGUF's `llama` rotates neighbouring pairs, so its converter interleaved the two halves of each
    head that Hugging Face (and this decoder) rotates against each other. Other architectures
    kept theirs.
    """
    projection = name.split(".")[-2]
    if config.architecture != "llama" or projection not in ("q_proj", "k_proj"):
        return weight
    pairs = torch.arange(weight.shape[0]).view(-1, config.head_size // 2, 2)
    rows = pairs.transpose(1, 2).flatten()
    return weight.take(rows) if isinstance(weight, Grouped) else weight[rows]


def _owned(values: Any) -> Any:
    """Return a float32 array that does not lie in the mapped file."""
    return np.array(values, dtype=np.float32, copy=True) if _mapped(values) else values


def _mapped(values: Any) -> bool:
    return values.dtype != np.float32 or not values.flags.owndata or not values.flags.writeable


def _eos_ids(fields: dict[str, Any]) -> frozenset[int]:
    """Return the tokens that end a text or a turn."""
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = (fields.get(f"tokenizer.ggml.{name}") for name in names)
    return frozenset(int(field.contents()) for field in found if field is not None)
