"""GPT-2 and GPT-3: learned positions, LayerNorm before each half of a block, GELU.

Shape suffixes: B batch, T tokens, D model width, H heads, K head width, V vocabulary.
A block is a function of x_BTD alone, so a pipeline may be cut between any two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.models.inputs import Example, check_tokens, random_ids

FAMILY = "gpt"


@dataclass(frozen=True)
class Config:
    """The numbers that make a GPT; `source` says where they come from."""

    num_layers: int
    model_dim: int
    num_heads: int
    vocab_size: int
    max_tokens: int
    tied_embedding: bool
    source: str

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def ffn_dim(self) -> int:
        return 4 * self.model_dim

    @property
    def sizes(self) -> Mapping[str, int]:
        return {"batch": 1, "tokens": self.max_tokens}

    @property
    def summary(self) -> str:
        return (
            f"{self.num_layers} layers, width {self.model_dim}, {self.num_heads} heads, "
            f"vocabulary {self.vocab_size:,}, {self.max_tokens:,} tokens"
        )


class Attention(nn.Module):
    """Causal self-attention; the number of heads follows from the projections' width."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.query = nn.Linear(config.model_dim, config.model_dim)
        self.key = nn.Linear(config.model_dim, config.model_dim)
        self.value = nn.Linear(config.model_dim, config.model_dim)
        self.output = nn.Linear(config.model_dim, config.model_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BHTK = self.query(x_BTD).view(B, T, -1, self.head_dim).transpose(1, 2)
        k_BHTK = self.key(x_BTD).view(B, T, -1, self.head_dim).transpose(1, 2)
        v_BHTK = self.value(x_BTD).view(B, T, -1, self.head_dim).transpose(1, 2)
        mixed_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        return self.output(mixed_BHTK.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """Two linear layers around a GELU (the tanh form GPT-2 was trained with)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = nn.Linear(config.model_dim, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, config.model_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BTD), approximate="tanh"))


class Block(nn.Module):
    """Attention and feed-forward, each after a norm and around a residual."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.model_dim)
        self.attention = Attention(config)
        self.ffn_norm = nn.LayerNorm(config.model_dim)
        self.ffn = FeedForward(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class GPT(nn.Module):
    """Token ids in; logits out, or the mean cross-entropy when `targets` are given.

    There is no dropout: what is planned and compared here has to be repeatable.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.model_dim)
        self.position_embedding = nn.Embedding(config.max_tokens, config.model_dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.model_dim)
        self.head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        if config.tied_embedding:
            self.head.weight = self.token_embedding.weight

    def forward(self, ids_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        x_BTD = self.token_embedding(ids_BT) + self.position_embedding(positions_T)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV = self.head(self.final_norm(x_BTD))
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def build(config: Config) -> GPT:
    """Return the module (on whatever device is torch's current default)."""
    return GPT(config)


def inputs(
    config: Config,
    sizes: Mapping[str, int],
    *,
    device: str,
    dtype: torch.dtype,
    seed: int,
    targets: bool,
) -> Example:
    """Return random ids_BT, and targets_BT (the next tokens) when `targets`."""
    check_tokens(sizes["tokens"], config.max_tokens)
    ids_BT = random_ids((sizes["batch"], sizes["tokens"] + 1), config.vocab_size, device, seed)
    return ((ids_BT[:, :-1], ids_BT[:, 1:]) if targets else (ids_BT[:, :-1],)), {}


_GPT3 = "arXiv 2005.14165, table 2.1"
_EXAMPLE = "GPT example of microsoft/nnscaler"

# GPT-3 XL is printed there with 24 heads of 128, which is not its width of 2048: 16 of 128 are
# meant. Its vocabulary and tied embedding are GPT-2's (section 2.1 of the same paper).
CONFIGS: Mapping[str, Config] = {
    "gpt-tiny": Config(4, 128, 4, 256, 256, False, "ours: bytes, for tests and the demo"),
    "gpt-mini": Config(6, 384, 6, 256, 1024, False, "ours: bytes, trains on a laptop"),
    "gpt2": Config(12, 768, 12, 50257, 1024, True, "gpt2 config.json"),
    "gpt2-xl": Config(48, 1600, 25, 50257, 1024, True, "gpt2-xl config.json"),
    "gpt3-1.3b": Config(24, 2048, 16, 50257, 2048, True, _GPT3),
    "gpt3-2.7b": Config(32, 2560, 32, 50257, 2048, True, _GPT3),
    "gpt3-6.7b": Config(32, 4096, 32, 50257, 2048, True, _GPT3),
    "gpt3-15b": Config(48, 5120, 32, 51200, 2048, True, _EXAMPLE),
    "gpt3-175b": Config(96, 12288, 96, 50257, 2048, True, _GPT3),
}
