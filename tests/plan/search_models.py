"""Models that the search's tests plan, loaded as `search_models:<factory>`."""

from __future__ import annotations

import torch


def eight_layers(batch: int = 8, tokens: int = 64):
    """A GPT of eight layers and eight heads."""
    from toolkit.models import gpt

    model = gpt.GPT(gpt.Config(8, 256, 8, 512, 64, False, "eight-layers"))
    ids = torch.randint(0, 512, (batch, tokens + 1))
    return model, (), {"ids_BT": ids[:, :-1], "targets_BT": ids[:, 1:]}


def many_tokens(batch: int = 1, tokens: int = 4096):
    """Four blocks whose activations outweigh all else: few parameters, many tokens."""
    from toolkit.models import gpt

    model = gpt.GPT(gpt.Config(4, 256, 8, 64, tokens, False, "many-tokens"))
    ids = torch.randint(0, 64, (batch, tokens + 1))
    return model, (), {"ids_BT": ids[:, :-1], "targets_BT": ids[:, 1:]}


def large_vocabulary(batch: int = 8, tokens: int = 256):
    """Eight blocks beside a vocabulary that is larger than all of them."""
    from toolkit.models import gpt

    model = gpt.GPT(gpt.Config(8, 512, 8, 131072, tokens, False, "large-vocabulary"))
    ids = torch.randint(0, 131072, (batch, tokens + 1))
    return model, (), {"ids_BT": ids[:, :-1], "targets_BT": ids[:, 1:]}
