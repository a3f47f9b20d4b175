"""What a loader makes of a model's file, and what the file must hold for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from toolkit.errors import FormatError
from toolkit.serve.model.config import DecoderConfig


@dataclass(frozen=True)
class LoadedModel:
    """What a model's file says: shape, weights (named as in `expected`), tokens that end a text."""

    config: DecoderConfig
    weights: dict[str, torch.Tensor]
    eos_ids: frozenset[int]


def expected(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return every weight's name and shape: Hugging Face's names without the leading `model.`."""
    hidden, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
    rows = {"q": heads * config.head_size, "k": kv_heads * config.head_size}
    rows["v"] = rows["k"]
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config.vocab_size, hidden),
        "norm.weight": (hidden,),
    }
    if not config.tied_head:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        at = f"layers.{layer}."
        for name, size in rows.items():
            shapes[f"{at}self_attn.{name}_proj.weight"] = (size, hidden)
            if config.qkv_bias:
                shapes[f"{at}self_attn.{name}_proj.bias"] = (size,)
        shapes[f"{at}self_attn.o_proj.weight"] = (hidden, rows["q"])
        if config.output_bias:
            shapes[f"{at}self_attn.o_proj.bias"] = (hidden,)
        if config.qk_norm:
            shapes[f"{at}self_attn.q_norm.weight"] = (config.head_size,)
            shapes[f"{at}self_attn.k_norm.weight"] = (config.head_size,)
        shapes[f"{at}mlp.gate_proj.weight"] = (config.ffn_size, hidden)
        shapes[f"{at}mlp.up_proj.weight"] = (config.ffn_size, hidden)
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, config.ffn_size)
        shapes[f"{at}input_layernorm.weight"] = (hidden,)
        shapes[f"{at}post_attention_layernorm.weight"] = (hidden,)
    return shapes


def check(config: DecoderConfig, shapes: Mapping[str, Sequence[int]], where: Path) -> None:
    """Raise FormatError unless a file holds exactly the weights its configuration implies."""
    wanted = expected(config)
    for name, shape in wanted.items():
        if name not in shapes:
            raise FormatError(f"{where} has no weight {name!r}", remedy="the file is incomplete")
        if tuple(shapes[name]) != shape:
            raise FormatError(
                f"{where}: weight {name!r} is {tuple(shapes[name])}, its configuration says {shape}"
            )
    extra = sorted(set(shapes) - set(wanted))
    if extra:
        raise FormatError(
            f"{where} holds {len(extra)} weights that architecture {config.architecture!r} has no "
            f"use for, {extra[0]!r} first",
            remedy="this variant of the architecture is not supported",
        )
