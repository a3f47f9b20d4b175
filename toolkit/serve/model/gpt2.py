"""GPT-2's own terms in its Hugging Face folders, put into the decoder's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from toolkit.serve.model.config import DecoderConfig, check_supported
from toolkit.serve.model.loaded import split

_NAMES = {
    "wte": "embed_tokens",
    "wpe": "embed_positions",
    "ln_f": "norm",
    "ln_1": "input_layernorm",
    "attn.c_attn": "self_attn.qkv_proj",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
# Stored [in, out], the other way round from everybody else's.
_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# What would change the computation, and the values that are computed.
_SUPPORTED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def describe(
    *,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    ffn_size: int,
    vocab_size: int,
    max_context: int,
    norm_eps: float,
    tied_head: bool,
) -> DecoderConfig:
    """Return the configuration of a GPT-2 of these sizes (Radford et al. 2019)."""
    return DecoderConfig(
        architecture="gpt2",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=hidden_size // num_heads,
        ffn_size=ffn_size,
        vocab_size=vocab_size,
        max_context=max_context,
        norm_eps=norm_eps,
        tied_head=tied_head,
        qkv_bias=True,
        output_bias=True,
        norm="layer",
        positions="learned",
        ffn="gelu",
        ffn_bias=True,
    )


def config(settings: Mapping[str, Any], folder: Path) -> DecoderConfig:
    """Read config.json's fields. Raises KeyError for one that is missing, UsageError."""
    check_supported(settings, _SUPPORTED, folder / "config.json")
    hidden = settings["n_embd"]
    return describe(
        num_layers=settings["n_layer"],
        hidden_size=hidden,
        num_heads=settings["n_head"],
        ffn_size=settings.get("n_inner") or 4 * hidden,
        vocab_size=settings["vocab_size"],
        max_context=settings["n_positions"],
        norm_eps=settings["layer_norm_epsilon"],
        tied_head=bool(settings.get("tie_word_embeddings", True)),
    )


def weights(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors named and laid out as `loaded.expected` has them.

    A name that is not GPT-2's is kept, for the check against what is expected to name it.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        laid = torch.atleast_1d(tensor.T.contiguous() if name.endswith(_TRANSPOSED) else tensor)
        for part, rows in split(_renamed(name.removeprefix("transformer.")), len(laid)).items():
            found[part] = laid[rows.start : rows.stop]
    return found


def _renamed(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("h."):
        return f"{_NAMES.get(stem, stem)}.{kind}"
    _, layer, inner = stem.split(".", 2)
    return f"layers.{layer}.{_NAMES.get(inner, inner)}.{kind}"
