"""Models that the search's tests plan, loaded as `search_models:<factory>`."""

from __future__ import annotations

import torch


def eight_layers(batch: int = 8, tokens: int = 64):
    """A GPT of eight layers and eight heads."""
    from toolkit.models import gpt

    model = gpt.GPT(gpt.Config(8, 256, 8, 512, 64, False, "eight-layers"))
    ids = torch.randint(0, 512, (batch, tokens + 1))
    return model, (), {"ids_BT": ids[:, :-1], "targets_BT": ids[:, 1:]}
