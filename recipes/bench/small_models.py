"""Models between a test's and a real one: a training step takes a good part of a second here.

toolkit plan search recipes/bench/small_models.py:gpt ...   (as `small_models:gpt` on the path)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from toolkit import models


def gpt(batch: int = 8, tokens: int = 256) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    return _made("gpt-mini", {}, batch=batch, tokens=tokens)


def swin(batch: int = 8) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    changes = {"depths": (2, 2, 2, 2), "embed_dim": 48, "num_labels": 100}
    return _made("swin-tiny", changes, batch=batch)


def evoformer(
    batch: int = 4, tokens: int = 48, sequences: int = 24
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    changes = {"num_layers": 4, "msa_dim": 128, "pair_dim": 64, "num_passes": 1}
    return _made("evoformer-tiny", changes, batch=batch, tokens=tokens, sequences=sequences)


def _made(
    name: str, changes: dict[str, Any], **sizes: int
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    found = models.load(name, **changes)
    device = str(torch.get_default_device())
    args, kwargs = found.example(**sizes, device=device)
    return found.build(device), args, kwargs
