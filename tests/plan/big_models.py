"""Models too large to hold, of which shapes are enough; loaded as `big_models:<factory>`."""

from __future__ import annotations

from dataclasses import replace

import torch


def llama70b_4_layers(batch: int = 128, tokens: int = 1024):
    """Four layers of Llama 3 70B with its embedding and head: 5.5 G parameters."""
    from toolkit.models import llama

    config = replace(llama.CONFIGS["llama3-70b"], num_layers=4)
    ids = torch.randint(config.vocab_size, (batch, tokens + 1))
    return llama.build(config), (ids[:, :-1], ids[:, 1:]), {}
