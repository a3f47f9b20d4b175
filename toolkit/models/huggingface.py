"""`hf:<hub id or folder>`: a transformers model, its code unmodified, from its config alone."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolkit.errors import FormatError, UsageError, require
from toolkit.models import hub
from toolkit.models.init import seeded
from toolkit.models.inputs import Example, check_tokens, random_ids, random_values
from toolkit.models.model import Model

# Which Auto classes are looked through for a config's architecture; without one, the first that
# has a class for the config is taken.
_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModel",
)
_DEFAULT_TOKENS = 1024


def load(ref: str) -> Model:
    """Return the model of an `hf:` reference; only its config is read.

    Random weights are what `build` gives on a real device too: weights come from
    `toolkit.models.weights.resolve`.
    """
    config = _config(ref.removeprefix("hf:"))
    auto_name, model_class = _model_class(config, ref)
    # A cache of keys and values would be an output of every layer of a training step.
    if hasattr(config, "use_cache"):
        config.use_cache = False
    takes = model_class.main_input_name
    if takes not in ("input_ids", "pixel_values"):
        raise UsageError(
            f"{ref} takes {takes}, and an example of it cannot be made up",
            remedy="write a factory that returns (module, args, kwargs) and use module:factory",
        )
    make_inputs = _image_inputs if takes == "pixel_values" else _text_inputs

    def builder(device: str, dtype: torch.dtype, seed: int) -> nn.Module:
        auto = getattr(require("transformers", extra="train"), auto_name)
        with seeded(device, seed):
            # The copy: building writes into the config (attention chosen, problem type).
            module: nn.Module = auto.from_config(copy.deepcopy(config), dtype=dtype)
        return module

    def inputs(
        sizes: Mapping[str, int], device: str, dtype: torch.dtype, seed: int, targets: bool
    ) -> Example:
        kwargs = make_inputs(config, sizes, device, dtype, seed)
        if config.is_encoder_decoder:
            shape = (sizes["batch"], sizes["tokens"])
            vocab_size = config.get_text_config().vocab_size
            kwargs["decoder_input_ids"] = random_ids(shape, vocab_size, device, seed + 1)
        if targets and "labels" in inspect.signature(model_class.forward).parameters:
            kwargs["labels"] = _labels(auto_name, config, kwargs, device, seed)
        return (), kwargs

    return Model(
        name=ref,
        family=f"hf-{config.model_type}",
        config=config,
        sizes=_sizes(config, takes),
        source=f"transformers {model_class.__name__}",
        summary=_summary(config),
        builder=builder,
        inputs=inputs,
    )


def _config(target: str) -> Any:
    transformers = require("transformers", extra="train")
    folder = Path(target).expanduser()
    if not folder.is_dir() and (target.startswith(("/", ".", "~")) or target.count("/") > 1):
        raise UsageError(f"no such folder: {folder}")
    if not folder.is_dir():
        folder = hub.snapshot(target, ["config.json"])
    _check_config_file(folder / "config.json")
    try:
        return transformers.AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise UsageError(
            f"transformers {transformers.__version__} cannot read {target!r}: {first}",
            remedy="a model that brings its own code is not run; use module:factory for it",
        ) from error


def _check_config_file(path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"{path.parent} has no config.json, so it is no transformers model")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is corrupt: {error}") from error
    if not isinstance(found, dict) or "model_type" not in found:
        raise FormatError(f"{path} names no model_type, so it is no transformers config")


def _model_class(config: Any, ref: str) -> tuple[str, Any]:
    """Return the Auto class's name and the model class it makes of `config`."""
    transformers = require("transformers", extra="train")
    wanted = (getattr(config, "architectures", None) or [None])[0]
    for auto_name in _AUTO_CLASSES:
        found = getattr(transformers, auto_name)._model_mapping.get(type(config), None)
        classes = found if isinstance(found, tuple | list) else [found] if found else []
        for model_class in classes:
            if wanted is None or model_class.__name__ == wanted:
                return auto_name, model_class
    raise UsageError(
        f"{ref} is a {wanted or config.model_type}, which none of these can make: "
        + ", ".join(_AUTO_CLASSES),
        remedy="write a factory that makes it and use module:factory",
    )


def _sizes(config: Any, takes: str) -> Mapping[str, int]:
    if takes == "pixel_values":
        return {"batch": 1}
    tokens = min(_max_tokens(config), _DEFAULT_TOKENS)
    if config.is_encoder_decoder:
        return {"batch": 1, "tokens": tokens, "source_tokens": tokens}
    return {"batch": 1, "tokens": tokens}


def _max_tokens(config: Any) -> int:
    """The longest sequence, or the default where positions are not limited (T5, Mamba)."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or _DEFAULT_TOKENS


def _text_inputs(
    config: Any, sizes: Mapping[str, int], device: str, dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    text = config.get_text_config()
    tokens = sizes.get("source_tokens", sizes["tokens"])
    if getattr(text, "max_position_embeddings", None):
        check_tokens(max(tokens, sizes["tokens"]), text.max_position_embeddings)
    return {"input_ids": random_ids((sizes["batch"], tokens), text.vocab_size, device, seed)}


def _image_inputs(
    config: Any, sizes: Mapping[str, int], device: str, dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    side = config.image_size
    height, width = side if isinstance(side, list | tuple) else (side, side)
    shape = (sizes["batch"], config.num_channels, height, width)
    return {"pixel_values": random_values(shape, dtype, device, seed)}


def _labels(
    auto_name: str, config: Any, kwargs: dict[str, Any], device: str, seed: int
) -> torch.Tensor:
    shape = tuple(next(reversed(kwargs.values())).shape)  # the decoder's, where there is one
    if auto_name in ("AutoModelForImageClassification", "AutoModelForSequenceClassification"):
        return random_ids(shape[:1], config.num_labels, device, seed + 2)
    if auto_name == "AutoModelForTokenClassification":
        return random_ids(shape, config.num_labels, device, seed + 2)
    return random_ids(shape, config.get_text_config().vocab_size, device, seed + 2)


def _summary(config: Any) -> str:
    names = {
        "num_hidden_layers": "layers", "hidden_size": "width", "num_attention_heads": "heads",
        "vocab_size": "vocabulary", "image_size": "image",
    }  # fmt: skip
    text = config.get_text_config()
    found = {label: getattr(text, name, None) for name, label in names.items()}
    return ", ".join(f"{label} {value}" for label, value in found.items() if value is not None)
