"""Small models with the corners that plans must get right; loaded as `toy_models:<factory>`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional


class _Half(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.relu(self.up(x)))


class Chain(nn.Module):
    """Four feed-forward blocks and nothing else: the first block's input needs no gradient."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(_Half(width) for _ in range(4)))

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return functional.mse_loss(self.layers(x), targets)


def chain(batch: int = 4, width: int = 16):
    return Chain(16), (torch.randn(batch, width), torch.randn(batch, width)), {}


def tied(batch: int = 4, tokens: int = 16):
    """A GPT whose head is its embedding: two pipeline stages hold one parameter."""
    from toolkit.models import gpt

    model = gpt.GPT(gpt.Config(4, 32, 4, 64, 32, True, "test"))
    ids = torch.randint(0, 64, (batch, tokens + 1))
    return model, (ids[:, :-1], ids[:, 1:]), {}


class Uneven(nn.Module):
    """Odd sizes, which FSDP2 pads; a parameter every block reads; one that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Half(7) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(3, 7))
        self.unused = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x) * self.scale.sum(0)
        return functional.mse_loss(self.head(x), targets)


def uneven(batch: int = 4):
    return Uneven(), (torch.randn(batch, 7), torch.randn(batch, 5)), {}


class _Biased(nn.Module):
    """A block that adds a bias made of a parameter alone, and hands it on."""

    def __init__(self, width: int, *, makes: bool) -> None:
        super().__init__()
        self.ffn = _Half(width)
        self.table = nn.Parameter(torch.randn(1, width)) if makes else None

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.table is not None:
            bias = self.table.tanh()
        return (x + self.ffn(x) if bias is None else x + self.ffn(x) * bias), bias


class Biased(nn.Module):
    """Eight blocks; the third makes a table of biases that all after it read, as T5's decoder does:
    a stage sends something that nothing it received leads to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Biased(8, makes=i == 2) for i in range(8))
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        bias = None
        for layer in self.layers:
            x, bias = layer(x, bias)
        return functional.mse_loss(self.head(x), target)


def biased(batch: int = 8):
    return Biased(), (torch.randn(batch, 8), torch.randn(batch, 8)), {}


def evoformer(batch: int = 8):
    """An Evoformer that runs its blocks once: two tensors cross every border."""
    from toolkit.models.evoformer import CONFIGS, Evoformer

    config = replace(CONFIGS["evoformer-tiny"], num_layers=4, num_passes=1)
    ids = torch.randint(0, 23, (batch, 4, 8))
    return Evoformer(config), (ids, ids.clone(), torch.randint(0, 64, (batch, 8, 8))), {}


class _Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.max_pool2d(self.mix(x), 3, 1, 1)


class Convolutions(nn.Module):
    """Windows that overlap, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Windows() for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, image: Tensor, targets: Tensor) -> Tensor:
        for layer in self.layers:
            image = layer(image)
        return functional.mse_loss(self.head(image.mean((2, 3))), targets)


def convolutions(batch: int = 2):
    return Convolutions(), (torch.randn(batch, 4, 8, 8), torch.randn(batch, 3)), {}
