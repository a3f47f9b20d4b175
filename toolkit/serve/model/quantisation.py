"""Which weight formats a model is served in, and the decoder that serves them."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

import torch

from toolkit import log
from toolkit.config import cache_dir
from toolkit.errors import ToolkitError, unknown_name
from toolkit.serve.model.decoder import Decoder
from toolkit.serve.model.grouped import GROUP, Grouped, Weight, dense, quantise
from toolkit.serve.model.kernels.library import Library, Team, library
from toolkit.serve.model.kernels.packed import pack
from toolkit.serve.model.loaded import LoadedModel
from toolkit.serve.model.native import NativeDecoder

logger = log.get_logger(__name__)

Mode = Literal["none", "int8", "int4"]
MODES: tuple[Mode, ...] = get_args(Mode)
# Every logit is a sum over one row of these: four bits are too few for them.
_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
# Added to the embedding, never multiplied.
_POSITIONS = "embed_positions.weight"
# A decoding sequence alone, and a full batch: what is timed to choose a format.
_ROWS = (1, 32)
# More than processors cache, so that a row alone is timed against memory.
_MATRIX = (1 << 16, 1024)


def check_mode(mode: str) -> str:
    """Return `mode` if it is a known one, or "auto". Raises UsageError for any other."""
    if mode not in (*MODES, "auto"):
        raise unknown_name("quantisation", mode, (*MODES, "auto"))
    return mode


def chosen(mode: str, weights: Iterable[Weight], threads: int) -> Mode:
    """Return the format to serve in: as asked, or for "auto" the fastest that was measured here.

    What "auto" may choose from: float32, 8 bits, and 4 bits if most of the file's own weights have
    no more. Without the kernels it is float32, because in torch nothing else is faster.
    """
    check_mode(mode)
    for known in MODES:
        if mode == known:
            return known
    held = {4: 0, 8: 0, 32: 0}
    for weight in weights:
        held[weight.bits if isinstance(weight, Grouped) else 32] += weight.shape.numel()
    try:
        took = step_seconds(library(), threads)
    except ToolkitError:
        return "none"
    allowed = [m for m in MODES if m != "int4" or held[4] > held[8] + held[32]]
    return min(allowed, key=lambda each: took[each])


def step_seconds(kernels: Library, threads: int, folder: Path | None = None) -> dict[Mode, float]:
    """Return what one matrix takes in each format, 1 row and 32 rows together; measured once.

    Kept in the cache by the kernels' build, which changes with the processor, and by threads.
    """
    folder = folder or cache_dir() / "kernels"
    kept = folder / f"{Path(kernels.calls._name).stem}-{threads}.json"
    try:
        found = json.loads(kept.read_text())
        return {mode: float(found[mode]) for mode in MODES}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    team = Team(kernels, threads)
    took = {mode: _seconds(kernels, team, mode) for mode in MODES}
    team.close()
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(took))
    return took


def _seconds(kernels: Library, team: Team, mode: Mode) -> float:
    draw = torch.Generator().manual_seed(0)
    shape, scales = _MATRIX, torch.ones(_MATRIX[0], _MATRIX[1] // GROUP)
    weight: Weight
    if mode == "none":
        weight = torch.ones(shape)
    elif mode == "int8":
        levels = torch.randint(-127, 128, shape, dtype=torch.int8, generator=draw)
        weight = Grouped(8, levels, scales)
    else:
        levels = torch.randint(0, 16, shape, dtype=torch.uint8, generator=draw)
        weight = Grouped(4, levels, scales, -8 * scales)
    matrix = pack(weight, kernels)
    total = 0.0
    for rows in _ROWS:
        x, y = torch.randn(rows, shape[1], generator=draw), torch.empty(rows, matrix.padded_rows)
        took = []
        for _ in range(4):
            start = time.perf_counter()
            team.multiply(matrix.c, x.data_ptr(), rows, y.data_ptr())
            took.append(time.perf_counter() - start)
        total += statistics.median(took[1:])
    return total


def converted(name: str, weight: Weight, mode: Mode, *, finer: bool = False) -> Weight:
    """Return one weight in the format that `mode` holds it in.

    "none" is float32. "int8" and "int4" take the file's own groups where it has them at these
    bits; "int4" has 8 bits where the file has 8 or is `finer` than 4, and for the vocabulary.
    """
    if len(weight.shape) < 2 or name == _POSITIONS or mode == "none":
        return dense(weight)
    if isinstance(weight, Grouped) and weight.bits in ((8,) if mode == "int8" else (4, 8)):
        return weight
    return quantise(dense(weight), 8 if mode == "int8" or finer or name in _VOCABULARY else 4)


def kv_dtype(mode: Mode) -> torch.dtype:
    """Return what keys and values are kept in: beside rounded weights, half precision is enough."""
    return torch.float32 if mode == "none" else torch.float16


def make_decoder(model: LoadedModel, mode: Mode) -> Decoder | NativeDecoder:
    """Return the decoder of a loaded model, whose `weights` are emptied.

    The kernels' where they can be built, else, with a warning, torch's.
    """
    for name in list(model.weights):
        weight = model.weights[name]
        model.weights[name] = converted(name, weight, mode, finer=name in model.finer)
    try:
        return NativeDecoder(model.config, model.weights, kv_dtype=kv_dtype(mode))
    except ToolkitError as error:
        logger.warning("%s", error)
        return Decoder(model.config, model.weights, kv_dtype=kv_dtype(mode))
