"""What a loader makes of a model's file, and what the file must hold for it."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from toolkit.errors import FormatError
from toolkit.serve.model.config import DecoderConfig
from toolkit.serve.model.grouped import Grouped, Weight, alike, dense, joined


@dataclass(frozen=True)
class LoadedModel:
    """What a model's file says: shape, weights (named as in `expected`), tokens that end a text.

    `finer` names weights that are float32 here and in the file have more than 4 bits and no float.
    """

    config: DecoderConfig
    weights: dict[str, Weight]
    eos_ids: frozenset[int]
    finer: frozenset[str] = frozenset()


@dataclass(frozen=True)
class NormWeights:
    """What a norm scales by and, if it is a layer norm, adds."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights: query, key and value stacked, because they read the same input."""

    attention_norm: NormWeights
    qkv: Weight
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: Weight
    output_bias: torch.Tensor | None
    ffn_norm: NormWeights
    gate: Weight | None
    up: Weight
    up_bias: torch.Tensor | None
    down: Weight
    down_bias: torch.Tensor | None


def take_norm(weights: MutableMapping[str, Weight], name: str) -> NormWeights:
    """Take a norm's weights out of `weights`."""
    bias = weights.pop(f"{name}.bias", None)
    return NormWeights(dense(weights.pop(f"{name}.weight")), None if bias is None else dense(bias))


def take_layer(weights: MutableMapping[str, Weight], prefix: str) -> LayerWeights:
    """Take one layer's weights out of `weights`."""

    def vector(name: str) -> torch.Tensor | None:
        found = weights.pop(prefix + name, None)
        return None if found is None else dense(found)

    qkv = [f"{prefix}self_attn.{name}_proj" for name in "qkv"]
    biased = f"{qkv[0]}.bias" in weights
    gate = weights.pop(f"{prefix}mlp.gate_proj.weight", None)
    up = weights.pop(f"{prefix}mlp.up_proj.weight")
    if gate is not None:
        gate, up = alike([gate, up])
    return LayerWeights(
        attention_norm=take_norm(weights, f"{prefix}input_layernorm"),
        qkv=joined([weights.pop(f"{name}.weight") for name in qkv]),
        qkv_bias=torch.cat([dense(weights.pop(f"{name}.bias")) for name in qkv])
        if biased
        else None,
        q_norm=vector("self_attn.q_norm.weight"),
        k_norm=vector("self_attn.k_norm.weight"),
        output=weights.pop(f"{prefix}self_attn.o_proj.weight"),
        output_bias=vector("self_attn.o_proj.bias"),
        ffn_norm=take_norm(weights, f"{prefix}post_attention_layernorm"),
        gate=gate,
        up=up,
        up_bias=vector("mlp.up_proj.bias"),
        down=weights.pop(f"{prefix}mlp.down_proj.weight"),
        down_bias=vector("mlp.down_proj.bias"),
    )


def expected(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return every weight's name and shape: Hugging Face's names without the leading `model.`."""
    hidden, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
    rows = {"q": heads * config.head_size, "k": kv_heads * config.head_size}
    rows["v"] = rows["k"]
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config.vocab_size, hidden),
    }
    norms = ["norm"]
    if config.positions == "learned":
        shapes["embed_positions.weight"] = (config.max_context, hidden)
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
        if config.ffn == "silu_gate":
            shapes[f"{at}mlp.gate_proj.weight"] = (config.ffn_size, hidden)
        shapes[f"{at}mlp.up_proj.weight"] = (config.ffn_size, hidden)
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, config.ffn_size)
        if config.ffn_bias:
            shapes[f"{at}mlp.up_proj.bias"] = (config.ffn_size,)
            shapes[f"{at}mlp.down_proj.bias"] = (hidden,)
        norms += [f"{at}input_layernorm", f"{at}post_attention_layernorm"]
    for kind in ("weight", "bias") if config.norm == "layer" else ("weight",):
        shapes |= {f"{name}.{kind}": (hidden,) for name in norms}
    return shapes


def split(name: str, rows: int) -> dict[str, range]:
    """Return the names here of a file's weight, and which of its rows each is.

    One name and all rows, but for a `qkv_proj`, which is three matrices in one.

    >>> split("layers.0.self_attn.qkv_proj.bias", 6)["layers.0.self_attn.k_proj.bias"]
    range(2, 4)
    """
    if ".qkv_proj." not in name:
        return {name: range(rows)}
    ends = [rows * i // 3 for i in range(4)]
    return {
        name.replace("qkv_proj", f"{part}_proj"): range(*ends[i : i + 2])
        for i, part in enumerate("qkv")
    }


def rows_of(weight: Weight, rows: range) -> Weight:
    """Return these rows of a weight: itself when they are all."""
    if len(rows) == weight.shape[0]:
        return weight
    index = torch.arange(rows.start, rows.stop)
    return weight.take(index) if isinstance(weight, Grouped) else weight[index]


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
