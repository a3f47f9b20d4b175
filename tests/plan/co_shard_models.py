"""Models whose activations are large: `co_shard_models:gpt` and `co_shard_models:swin`."""

from __future__ import annotations

from typing import Any

import torch

from toolkit.models import gpt as gpts
from toolkit.models import swin as swins


def gpt(batch: int = 1, tokens: int = 1024) -> Any:
    """Four layers, eight heads, and a sequence much longer than it is wide."""
    config = gpts.Config(4, 256, 8, 64, tokens, False, "test")
    ids = torch.randint(0, 64, (batch, tokens + 1))
    return gpts.GPT(config), (ids[:, :-1], ids[:, 1:]), {}


def swin(batch: int = 1) -> Any:
    """Windows of 16 x 16 patches: the scores of one outweigh all else."""
    config = swins.Config(128, 16, (2, 2), 64, 4, "test", num_labels=10)
    image, labels = torch.randn(batch, 3, 128, 128), torch.randint(0, 10, (batch,))
    return swins.Swin(config), (image, labels), {}
