"""A small random model with SmolLM2's vocabulary, for tests that need no sense in what it says."""

from __future__ import annotations

import torch

from toolkit.serve.model.config import DecoderConfig
from toolkit.serve.model.loaded import LoadedModel, expected


def tiny_model() -> LoadedModel:
    # 2 layers of 32, 4 heads over 2 key-value heads of 8; SmolLM2's vocabulary, for its tokenizer.
    config = DecoderConfig(
        "llama", 2, 32, 4, 2, 8, 48, 49_152, 4096, 1e-5, 10_000.0, tied_head=True
    )
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.3
        for name, shape in expected(config).items()
    }
    return LoadedModel(config, tensors, frozenset({2}))
