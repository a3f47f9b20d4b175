"""The shape of a decoder of the Llama or GPT-2 family, as read from a model's own file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from toolkit.errors import UsageError


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched past the trained context (Llama 3.1's rule)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches. `qkv_bias` is Qwen2's, `qk_norm` Qwen3's; the other defaults are Llama's.

    GPT-2 has layer norms (with biases), `learned` positions that are added to the embedding, and
    `gelu` (its tanh form) where Llama multiplies by a `silu_gate`. `rope_theta`, `rope_scaling` and
    `rope_divisors` are of rotary positions only. `rope_divisors` are GGUF's per-frequency factors,
    the same thing as `rope_scaling` already worked out; at most one of the two is set.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn_size: int
    vocab_size: int
    max_context: int
    norm_eps: float
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rope_divisors: tuple[float, ...] | None = None
    tied_head: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    norm: Literal["rms", "layer"] = "rms"
    positions: Literal["rotary", "learned"] = "rotary"
    ffn: Literal["silu_gate", "gelu"] = "silu_gate"
    ffn_bias: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UsageError(
                f"{self.num_kv_heads} key-value heads do not divide {self.num_heads} heads"
            )

    @property
    def group_size(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_heads // self.num_kv_heads

    def kv_bytes_per_token(self, bytes_per_value: int = 4) -> int:
        """Return the KV cache's bytes per token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * bytes_per_value


def check_supported(
    settings: Mapping[str, Any], supported: Mapping[str, Sequence[Any]], where: Path
) -> None:
    """Raise UsageError where a field has another value than those that are computed here."""
    for name, values in supported.items():
        if name in settings and settings[name] not in values:
            known = " or ".join(repr(value) for value in values if value is not None)
            raise UsageError(
                f"{where} sets {name} to {settings[name]!r}, which is not supported",
                remedy=f"served is {known or 'a model without it'}: this one needs another engine",
            )
