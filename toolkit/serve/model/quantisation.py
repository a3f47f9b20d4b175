"""Which weight formats a model is served in, and the decoder that serves them."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from toolkit import log
from toolkit.errors import ToolkitError, unknown_name
from toolkit.serve.model.decoder import Decoder
from toolkit.serve.model.grouped import Grouped, Weight, dense, quantise
from toolkit.serve.model.loaded import LoadedModel
from toolkit.serve.model.native import NativeDecoder

logger = log.get_logger(__name__)

Mode = Literal["none", "int8", "int4"]
MODES: tuple[Mode, ...] = get_args(Mode)
# Every logit is a sum over one row of these: four bits are too few for them.
_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")


def check_mode(mode: str) -> Mode:
    """Return `mode` as one of the known ones. Raises UsageError for any other."""
    if mode not in MODES:
        raise unknown_name("quantisation", mode, MODES)
    return mode  # type: ignore[return-value]


def converted(name: str, weight: Weight, mode: Mode) -> Weight:
    """Return one weight in the format that `mode` holds it in.

    "none" is float32. "int8" and "int4" take the file's own groups where it has them at these
    bits; "int4" keeps 8 bits where the file has 8, and for the vocabulary.
    """
    if len(weight.shape) < 2 or mode == "none":
        return dense(weight)
    if isinstance(weight, Grouped) and weight.bits in ((8,) if mode == "int8" else (4, 8)):
        return weight
    return quantise(dense(weight), 8 if mode == "int8" or name in _VOCABULARY else 4)


def make_decoder(model: LoadedModel, mode: Mode) -> Decoder | NativeDecoder:
    """Return the decoder of a loaded model, whose `weights` are emptied.

    The kernels' where they can be built, else, with a warning, torch's.
    """
    for name in list(model.weights):
        model.weights[name] = converted(name, model.weights[name], mode)
    try:
        # With weights rounded this far, half-precision keys and values cost nothing more.
        kv_dtype = torch.float32 if mode == "none" else torch.float16
        return NativeDecoder(model.config, model.weights, kv_dtype=kv_dtype)
    except ToolkitError as error:
        logger.warning("%s", error)
        return Decoder(model.config, model.weights)
