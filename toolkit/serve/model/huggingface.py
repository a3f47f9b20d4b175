"""Read a Hugging Face folder: config.json and its safetensors, as float32."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from toolkit.errors import FormatError, UsageError, require, unknown_name
from toolkit.serve.model import gpt2
from toolkit.serve.model.config import DecoderConfig, RopeScaling, check_supported
from toolkit.serve.model.loaded import LoadedModel, check
from toolkit.serve.model.part import Part

_ARCHITECTURES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
_INDEX = "model.safetensors.index.json"
# Buffers that old checkpoints carry and every loader recomputes: frequencies, GPT-2's masks.
_DERIVED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What would change the computation, and the values that are computed. Some are fields of related
# families, which derived checkpoints carry over.
_NO, _ONE, _UNSET = (False, None), (1, None), (None,)
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": _NO,
    "partial_rotary_factor": _ONE,
    "rotary_pct": _ONE,
    "attn_logit_softcapping": _UNSET,
    "final_logit_softcapping": _UNSET,
    "attention_multiplier": _UNSET,
    "query_pre_attn_scalar": _UNSET,
    "embedding_multiplier": _ONE,
    "residual_multiplier": _ONE,
    "logits_scaling": _ONE,
    "logit_scale": _ONE,
    "attention_chunk_size": _UNSET,
    "clip_qkv": _UNSET,
    "rope_interleaved": _NO,
    "is_causal": (True, None),
    "use_bidirectional_attention": _NO,
}
# Files in which older tools say what `quantization_config` says.
_QUANTISED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"
_FULL, _SLIDING = "full_attention", "sliding_attention"


def load(folder: Path, part: Part | None = None) -> LoadedModel:
    """Read the model in `folder`, or a rank's part; see weights.load for what is raised."""
    settings = _json(folder / "config.json")
    config = _config(settings, folder)
    _refuse_quantised(settings, folder)
    computed = config if part is None else part.config(config)
    weights, shapes = _weights(folder, part)
    if config.architecture == "gpt2":
        weights = gpt2.weights(weights)
        shapes = {name: weight.shape for name, weight in weights.items()}
    if config.tied_head:
        shapes.pop(_HEAD, None)
        head, twin = weights.pop(_HEAD, None), weights.get(_EMBEDDING)
        if part is not None and twin is not None:
            twin = part.of(_HEAD, twin)
        if head is not None and twin is not None and not torch.equal(head, twin):
            raise FormatError(
                f"{folder}/config.json sets tie_word_embeddings to true, and the file's {_HEAD} "
                f"differs from its {_EMBEDDING}",
                remedy="set it to false, if the model was trained so",
            )
    check(config, shapes, folder)
    if part is not None:
        weights |= part.head(config, weights)
    return LoadedModel(computed, dict(weights), _eos_ids(settings, folder))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FormatError(
            f"{path.parent} has no {path.name}", remedy="give a Hugging Face model folder"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is corrupt: {error}") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path} is not a JSON object")
    return found


def _config(settings: dict[str, Any], folder: Path) -> DecoderConfig:
    architecture = settings.get("model_type", "")
    if architecture not in _ARCHITECTURES:
        raise unknown_name(f"architecture in {folder}:", architecture, _ARCHITECTURES)
    try:
        if architecture == "gpt2":
            return gpt2.config(settings, folder)
        return _llama(architecture, settings, folder)
    except KeyError as error:
        raise FormatError(f"{folder}/config.json does not state {error}") from error


def _llama(architecture: str, settings: dict[str, Any], folder: Path) -> DecoderConfig:
    file = folder / "config.json"
    check_supported(settings, _SUPPORTED, file)
    heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
    # transformers 5 writes rope_parameters; before, rope_theta and rope_scaling lay apart.
    rope = settings.get("rope_parameters") or {
        "rope_theta": settings.get("rope_theta", 10000.0),
        **(settings.get("rope_scaling") or {}),
    }
    check_supported(rope, _SUPPORTED, file)
    head_size = settings.get("head_dim") or hidden // heads
    scaling, divisors = _rope(rope, head_size, folder)
    biased = bool(settings.get("attention_bias", False))
    return DecoderConfig(
        architecture=architecture,
        num_layers=settings["num_hidden_layers"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=settings.get("num_key_value_heads") or heads,
        head_size=head_size,
        ffn_size=settings["intermediate_size"],
        vocab_size=settings["vocab_size"],
        max_context=_context(architecture, settings, file),
        norm_eps=settings["rms_norm_eps"],
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=scaling,
        rope_divisors=divisors,
        tied_head=bool(settings.get("tie_word_embeddings", False)),
        qkv_bias=biased or architecture == "qwen2",
        output_bias=biased and architecture != "qwen2",
        qk_norm=architecture == "qwen3",
    )


def _context(architecture: str, settings: dict[str, Any], file: Path) -> int:
    """Return the longest context: within its window, sliding attention is plain attention."""
    for kind in settings.get("layer_types") or ():
        check_supported({"layer_types": kind}, {"layer_types": (_FULL, _SLIDING)}, file)
    # transformers' default, which a file that was written by it may leave out.
    default = 4096 if architecture == "mistral" else None
    context, window = settings["max_position_embeddings"], settings.get("sliding_window", default)
    return min(context, window) if window and settings.get("use_sliding_window", True) else context


def _rope(
    rope: dict[str, Any], head_size: int, folder: Path
) -> tuple[RopeScaling | None, tuple[float, ...] | None]:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None, None
    if kind == "linear":
        return None, (float(rope["factor"]),) * (head_size // 2)
    if kind == "llama3":
        scaling = RopeScaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_context=int(rope["original_max_position_embeddings"]),
        )
        return scaling, None
    raise UsageError(
        f"{folder} stretches its rotary embedding by {kind!r}, which is not supported",
        remedy="supported: default, linear, llama3",
    )


def _weights(
    folder: Path, part: Part | None
) -> tuple[dict[str, torch.Tensor], dict[str, Sequence[int]]]:
    """Return the weights, or a rank's part of each as it is read, and their whole shapes."""
    safetensors = require("safetensors", extra="serve")
    index = folder / _INDEX
    if index.exists():
        files = sorted(set(_json(index).get("weight_map", {}).values()))
    else:
        files = ["model.safetensors"]
    weights: dict[str, torch.Tensor] = {}
    shapes: dict[str, Sequence[int]] = {}
    for file in files:
        path = folder / file
        if not path.is_file():
            raise FormatError(
                f"{folder} has no {file}", remedy="save the model in the safetensors format"
            )
        try:
            with safetensors.safe_open(path, framework="pt") as tensors:
                names = tensors.keys()
                for stored in names:
                    if not stored.endswith(_DERIVED):
                        name, tensor = stored.removeprefix("model."), tensors.get_tensor(stored)
                        if tensor.dtype not in _DTYPES:
                            raise _quantised(f"{path} holds {stored!r} as {tensor.dtype}")
                        shapes[name] = tensor.shape
                        kept = tensor if part is None else part.of(name, tensor)
                        weights[name] = kept.to(torch.float32)
        except (safetensors.SafetensorError, ValueError, OSError) as error:
            raise FormatError(
                f"{path} is not a readable safetensors file: {error}",
                remedy="download or copy it again",
            ) from error
    return weights, shapes


def _refuse_quantised(settings: dict[str, Any], folder: Path) -> None:
    for field in ("quantization_config", "compression_config"):
        if found := settings.get(field):
            named = found.get("quant_method") if isinstance(found, dict) else None
            method = named or json.dumps(found)
            raise _quantised(f"{folder}/config.json says its weights are quantised by {method}")
    for name in _QUANTISED:
        if (folder / name).exists():
            raise _quantised(f"{folder}/{name} says its weights are quantised")


def _quantised(problem: str) -> UsageError:
    return UsageError(
        f"{problem}, which is not read",
        remedy="take the model's unquantised weights (and --quantize int8), or a GGUF file of it",
    )


def _eos_ids(settings: dict[str, Any], folder: Path) -> frozenset[int]:
    """Return the tokens that end a text or a turn: one number or a list, in either file."""
    found: set[int] = set()
    generation = folder / "generation_config.json"
    for source in (settings, _json(generation) if generation.exists() else {}):
        value = source.get("eos_token_id")
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(found)
