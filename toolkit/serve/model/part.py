"""What one rank of a tensor-parallel group holds of a model's weights (Megatron-LM, section 3).

Query, key, value, gate and up are split by outputs, so that a rank computes heads and features of
its own; output and down by inputs, so that their results are summed over the ranks; the head by
the vocabulary. Norms and the embedding are whole everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from toolkit.errors import InfeasibleError
from toolkit.serve.model.config import DecoderConfig
from toolkit.serve.model.grouped import Weight, dense

_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_ROWS = ("o_proj", "down_proj")
_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"


@dataclass(frozen=True)
class Part:
    """The share of rank `rank` of `degree`."""

    rank: int
    degree: int

    def config(self, whole: DecoderConfig) -> DecoderConfig:
        """Return what this rank computes: its own heads and features, of a head not tied.

        Raises InfeasibleError where heads or features cannot be divided, saying which degrees can,
        and for GPT-2.
        """
        if whole.ffn != "silu_gate":
            raise InfeasibleError(
                f"a model of architecture {whole.architecture} is not divided over ranks",
                remedy="serve it without a plan",
            )
        for name in ("num_kv_heads", "num_heads", "ffn_size"):
            size = getattr(whole, name)
            if size % self.degree:
                works = [str(degree) for degree in range(2, size + 1) if _divides(degree, whole)]
                degrees = f"use a plan of degree {' or '.join(works)}, or" if works else "use"
                raise InfeasibleError(
                    f"tensor parallel degree {self.degree} does not divide {name} {size}",
                    remedy=f"{degrees} one device without a plan",
                )
        return replace(
            whole,
            num_heads=whole.num_heads // self.degree,
            num_kv_heads=whole.num_kv_heads // self.degree,
            ffn_size=whole.ffn_size // self.degree,
            tied_head=False,
        )

    def of(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return this rank's share of the weight called `name` (`loaded.expected`), in memory of
        its own.
        """
        module, _, kind = name.rpartition(".")
        projection = module.rpartition(".")[2]
        if name == _HEAD or projection in _COLUMNS:
            return self._cut(weight, 0)
        if projection in _ROWS:
            if kind == "weight":
                return self._cut(weight, 1)
            # Added once: the ranks' results are summed.
            return weight if self.rank == 0 else torch.zeros_like(weight)
        return weight

    def head(self, config: DecoderConfig, weights: Mapping[str, Weight]) -> dict[str, torch.Tensor]:
        """Return this rank's share of the head where it is the embedding's twin, else nothing."""
        return {_HEAD: self.of(_HEAD, dense(weights[_EMBEDDING]))} if config.tied_head else {}

    def _cut(self, weight: torch.Tensor, dim: int) -> torch.Tensor:
        """Return an equal share along `dim`; zeros fill up the last where it falls short."""
        size = -(-weight.shape[dim] // self.degree)
        start = min(self.rank * size, weight.shape[dim])
        held = min(size, weight.shape[dim] - start)
        shape = list(weight.shape)
        shape[dim] = size
        share = weight.new_zeros(shape)
        share.narrow(dim, 0, held).copy_(weight.narrow(dim, start, held))
        return share


def _divides(degree: int, config: DecoderConfig) -> bool:
    sizes = (config.num_kv_heads, config.num_heads, config.ffn_size)
    return all(size % degree == 0 for size in sizes)
