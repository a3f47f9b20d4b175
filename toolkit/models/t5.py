"""T5 (arXiv 1910.10683): encoder and decoder around one shared, possibly very large, embedding.

Shape suffixes: B batch, T target tokens, S source tokens, D model width, H heads, K head width,
V vocabulary; Q and C the query and key positions of an attention (T or S each).

The relative position bias is computed once a stack and handed to its blocks, as T5 does. T5 does
not scale its scores. There is no dropout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.models.inputs import Example, random_ids

FAMILY = "t5"

_NORM_EPS = 1e-6
_NUM_BUCKETS = 32
_MAX_DISTANCE = 128


@dataclass(frozen=True)
class Config:
    """The numbers that make a T5; `num_layers` are in the encoder and again in the decoder."""

    num_layers: int
    model_dim: int
    num_heads: int
    vocab_size: int
    source: str
    default_tokens: int = 512
    head_dim: int = 64

    @property
    def ffn_dim(self) -> int:
        return 4 * self.model_dim

    @property
    def sizes(self) -> Mapping[str, int]:
        return {"batch": 1, "tokens": self.default_tokens, "source_tokens": self.default_tokens}

    @property
    def summary(self) -> str:
        return (
            f"{self.num_layers} + {self.num_layers} layers, width {self.model_dim}, "
            f"{self.num_heads} heads, vocabulary {self.vocab_size:,}"
        )


class PositionBias(nn.Module):
    """A learned bias per head and bucket of distance, the buckets growing with the distance."""

    def __init__(self, config: Config, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.table = nn.Embedding(_NUM_BUCKETS, config.num_heads)

    def forward(self, x_BQD: Tensor) -> Tensor:
        """Return [1, H, Q, Q] to add to the scores; minus infinity where looking is forbidden."""
        at_Q = torch.arange(x_BQD.shape[1], device=x_BQD.device)
        ahead_QQ = at_Q[None, :] - at_Q[:, None]  # key position minus query position
        bias_HQQ = self.table(self.bucket(ahead_QQ)).permute(2, 0, 1)
        if self.causal:
            bias_HQQ = bias_HQQ.masked_fill(ahead_QQ > 0, float("-inf"))
        return bias_HQQ.unsqueeze(0)

    def bucket(self, ahead_QQ: Tensor) -> Tensor:
        """Return the bucket of each distance: exact when near, logarithmic when far."""
        num_buckets = _NUM_BUCKETS if self.causal else _NUM_BUCKETS // 2
        num_exact = num_buckets // 2
        distance_QQ = (-ahead_QQ).clamp(min=0) if self.causal else ahead_QQ.abs()
        scale = (num_buckets - num_exact) / math.log(_MAX_DISTANCE / num_exact)
        # Distances below num_exact take the other branch; the clamp keeps the logarithm finite.
        far_QQ = num_exact + ((distance_QQ.clamp(min=1) / num_exact).log() * scale).long()
        near_QQ = torch.where(
            distance_QQ < num_exact, distance_QQ, far_QQ.clamp(max=num_buckets - 1)
        )
        return near_QQ if self.causal else near_QQ + (ahead_QQ > 0).long() * num_buckets


class Attention(nn.Module):
    """Attention of x's positions over memory's; the same tensor for self-attention."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        inner_dim = config.num_heads * config.head_dim
        self.head_dim = config.head_dim
        self.query = nn.Linear(config.model_dim, inner_dim, bias=False)
        self.key = nn.Linear(config.model_dim, inner_dim, bias=False)
        self.value = nn.Linear(config.model_dim, inner_dim, bias=False)
        self.output = nn.Linear(inner_dim, config.model_dim, bias=False)

    def forward(self, x_BQD: Tensor, memory_BCD: Tensor, bias_1HQC: Tensor | None) -> Tensor:
        B, Q, _ = x_BQD.shape
        C = memory_BCD.shape[1]
        q_BHQK = self.query(x_BQD).view(B, Q, -1, self.head_dim).transpose(1, 2)
        k_BHCK = self.key(memory_BCD).view(B, C, -1, self.head_dim).transpose(1, 2)
        v_BHCK = self.value(memory_BCD).view(B, C, -1, self.head_dim).transpose(1, 2)
        mixed_BHQK = F.scaled_dot_product_attention(
            q_BHQK, k_BHCK, v_BHCK, attn_mask=bias_1HQC, scale=1.0
        )
        return self.output(mixed_BHQK.transpose(1, 2).reshape(B, Q, -1))


class FeedForward(nn.Module):
    """Two linear layers around a ReLU, four times as wide inside."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = nn.Linear(config.model_dim, config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.model_dim, bias=False)

    def forward(self, x_BQD: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x_BQD)))


class EncoderBlock(nn.Module):
    """Self-attention and feed-forward, each after a norm and around a residual."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.model_dim, eps=_NORM_EPS)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.model_dim, eps=_NORM_EPS)
        self.ffn = FeedForward(config)

    def forward(self, x_BSD: Tensor, bias_1HSS: Tensor) -> Tensor:
        normed_BSD = self.attention_norm(x_BSD)
        x_BSD = x_BSD + self.attention(normed_BSD, normed_BSD, bias_1HSS)
        return x_BSD + self.ffn(self.ffn_norm(x_BSD))


class DecoderBlock(nn.Module):
    """Causal self-attention, attention over the encoder's output, and feed-forward."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.model_dim, eps=_NORM_EPS)
        self.attention = Attention(config)
        self.cross_norm = nn.RMSNorm(config.model_dim, eps=_NORM_EPS)
        self.cross = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.model_dim, eps=_NORM_EPS)
        self.ffn = FeedForward(config)

    def forward(self, x_BTD: Tensor, memory_BSD: Tensor, bias_1HTT: Tensor) -> Tensor:
        normed_BTD = self.attention_norm(x_BTD)
        x_BTD = x_BTD + self.attention(normed_BTD, normed_BTD, bias_1HTT)
        x_BTD = x_BTD + self.cross(self.cross_norm(x_BTD), memory_BSD, None)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class Encoder(nn.Module):
    """[B, S, D] embedded source -> [B, S, D] memory."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.position_bias = PositionBias(config, causal=False)
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.model_dim, eps=_NORM_EPS)

    def forward(self, x_BSD: Tensor) -> Tensor:
        bias_1HSS = self.position_bias(x_BSD)
        for block in self.blocks:
            x_BSD = block(x_BSD, bias_1HSS)
        return self.final_norm(x_BSD)


class Decoder(nn.Module):
    """[B, T, D] embedded target so far, and the memory -> [B, T, D]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.position_bias = PositionBias(config, causal=True)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.model_dim, eps=_NORM_EPS)

    def forward(self, x_BTD: Tensor, memory_BSD: Tensor) -> Tensor:
        bias_1HTT = self.position_bias(x_BTD)
        for block in self.blocks:
            x_BTD = block(x_BTD, memory_BSD, bias_1HTT)
        return self.final_norm(x_BTD)


class T5(nn.Module):
    """Source and target ids in; logits out, or the mean cross-entropy when labels are given."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.model_dim)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(
        self, source_BS: Tensor, target_BT: Tensor, labels_BT: Tensor | None = None
    ) -> Tensor:
        memory_BSD = self.encoder(self.embedding(source_BS))
        x_BTD = self.decoder(self.embedding(target_BT), memory_BSD)
        # The head is the embedding again, so T5 scales what it reads by D^-1/2.
        logits_BTV = F.linear(x_BTD * self.config.model_dim**-0.5, self.embedding.weight)
        if labels_BT is None:
            return logits_BTV
        return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())


def build(config: Config) -> T5:
    """Return the module (on whatever device is torch's current default)."""
    return T5(config)


def inputs(
    config: Config,
    sizes: Mapping[str, int],
    *,
    device: str,
    dtype: torch.dtype,
    seed: int,
    targets: bool,
) -> Example:
    """Return random source_BS and target_BT, and labels_BT (the next tokens) when `targets`."""
    batch, tokens = sizes["batch"], sizes["tokens"]
    source_BS = random_ids((batch, sizes["source_tokens"]), config.vocab_size, device, seed)
    ids_BT = random_ids((batch, tokens + 1), config.vocab_size, device, seed + 1)
    args = (source_BS, ids_BT[:, :-1], ids_BT[:, 1:])
    return (args if targets else args[:2]), {}


# The artifact gives one number of layers; here, as in its mT5 example, each stack has that many.
_LADDER = "nnScaler (OSDI'24) artifact, {} GPUs"

CONFIGS: Mapping[str, Config] = {
    "t5-tiny": Config(2, 64, 4, 1024, "ours: for tests", 32, head_dim=16),
    "t5-small": Config(6, 512, 8, 32_128, "t5-small config.json"),
    "t5-big-embedding-4": Config(24, 2048, 32, 512_000, _LADDER.format(4), 1024),
    "t5-big-embedding-8": Config(32, 3072, 48, 1_024_000, _LADDER.format(8), 1024),
    "t5-big-embedding-16": Config(32, 4096, 64, 1_536_000, _LADDER.format(16), 1024),
    "t5-big-embedding-32": Config(32, 6144, 96, 2_048_000, _LADDER.format(32), 1024),
}
