"""Llama and its relatives: RMSNorm, rotary positions, SwiGLU, grouped-query attention.

Shape suffixes: B batch, T tokens, D model width, H query heads, G key/value heads, K head width,
R half a head width (rotary pairs), V vocabulary.
A block is a function of x_BTD alone, so a pipeline may be cut between any two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.models.inputs import Example, check_tokens, random_ids

FAMILY = "llama"


@dataclass(frozen=True)
class Config:
    """The numbers that make a Llama; `qkv_bias` makes it a Qwen2."""

    num_layers: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    max_tokens: int
    rope_theta: float
    source: str
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    tied_embedding: bool = False

    @property
    def sizes(self) -> Mapping[str, int]:
        return {"batch": 1, "tokens": min(self.max_tokens, 4096)}

    @property
    def summary(self) -> str:
        return (
            f"{self.num_layers} layers, width {self.model_dim}, {self.num_heads}/"
            f"{self.num_kv_heads} heads, ffn {self.ffn_dim}, vocabulary {self.vocab_size:,}"
        )


def rotate(x_BHTK: Tensor, theta: float) -> Tensor:
    """Turn each pair (i, i + K/2) of position t by t * theta^(-2i/K) (RoFormer, arXiv 2104.09864).

    Computed where it is used: a table kept as a buffer would be lost when a module made on the
    meta device is given memory, and would have to travel between pipeline stages.
    """
    T, K = x_BHTK.shape[-2:]
    rate_R = theta ** (-torch.arange(0, K, 2, device=x_BHTK.device, dtype=torch.float32) / K)
    position_T = torch.arange(T, device=x_BHTK.device, dtype=torch.float32)
    angle_TR = position_T[:, None] * rate_R
    cos_TR, sin_TR = angle_TR.cos().to(x_BHTK.dtype), angle_TR.sin().to(x_BHTK.dtype)
    left_BHTR, right_BHTR = x_BHTK.chunk(2, dim=-1)
    return torch.cat(
        (left_BHTR * cos_TR - right_BHTR * sin_TR, right_BHTR * cos_TR + left_BHTR * sin_TR), dim=-1
    )


class Attention(nn.Module):
    """Causal attention in which H query heads share G key/value heads."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.rope_theta = config.rope_theta
        query_dim, kv_dim = (
            heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads)
        )
        self.query = nn.Linear(config.model_dim, query_dim, bias=config.qkv_bias)
        self.key = nn.Linear(config.model_dim, kv_dim, bias=config.qkv_bias)
        self.value = nn.Linear(config.model_dim, kv_dim, bias=config.qkv_bias)
        self.output = nn.Linear(query_dim, config.model_dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BHTK = self.query(x_BTD).view(B, T, -1, self.head_dim).transpose(1, 2)
        k_BGTK = self.key(x_BTD).view(B, T, -1, self.head_dim).transpose(1, 2)
        v_BGTK = self.value(x_BTD).view(B, T, -1, self.head_dim).transpose(1, 2)
        mixed_BHTK = F.scaled_dot_product_attention(
            rotate(q_BHTK, self.rope_theta),
            rotate(k_BGTK, self.rope_theta),
            v_BGTK,
            is_causal=True,
            enable_gqa=True,
        )
        return self.output(mixed_BHTK.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): a gated linear unit whose gate is a SiLU."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.model_dim, config.ffn_dim, bias=False)
        self.up = nn.Linear(config.model_dim, config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.model_dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
    """Attention and feed-forward, each after a norm and around a residual."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.model_dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.model_dim, eps=config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class Llama(nn.Module):
    """Token ids in; logits out, or the mean cross-entropy when `targets` are given."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.model_dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.model_dim, eps=config.norm_eps)
        self.head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        if config.tied_embedding:
            self.head.weight = self.token_embedding.weight

    def forward(self, ids_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        x_BTD = self.token_embedding(ids_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV = self.head(self.final_norm(x_BTD))
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def build(config: Config) -> Llama:
    """Return the module (on whatever device is torch's current default)."""
    return Llama(config)


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


CONFIGS: Mapping[str, Config] = {
    "llama-tiny": Config(
        4, 128, 4, 2, 32, 384, 512, 512, 10_000.0, "ours: for tests"
    ),
    "smollm2-135m": Config(
        30, 576, 9, 3, 64, 1536, 49_152, 8192, 100_000.0,
        "SmolLM2-135M config.json", tied_embedding=True,
    ),
    "llama3-8b": Config(
        32, 4096, 32, 8, 128, 14_336, 128_256, 8192, 500_000.0,
        "arXiv 2407.21783, table 3; config.json",
    ),
    "llama3-70b": Config(
        80, 8192, 64, 8, 128, 28_672, 128_256, 8192, 500_000.0,
        "arXiv 2407.21783, table 3; config.json",
    ),
    "qwen2.5-3b": Config(
        36, 2048, 16, 2, 128, 11_008, 151_936, 32_768, 1_000_000.0,
        "Qwen2.5-3B config.json", norm_eps=1e-6, qkv_bias=True, tied_embedding=True,
    ),
    "qwen2.5-14b": Config(
        48, 5120, 40, 8, 128, 13_824, 152_064, 131_072, 1_000_000.0,
        "Qwen2.5-14B config.json", norm_eps=1e-5, qkv_bias=True,
    ),
}  # fmt: skip
