"""Example inputs: random ids and images from a seed, or shapes alone on the meta device."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from toolkit.errors import UsageError

# What a module is called with: module(*args, **kwargs).
Example: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


def random_ids(shape: tuple[int, ...], num_ids: int, device: str, seed: int) -> Tensor:
    """Return int64 ids in [0, num_ids), the same on every device for one seed."""
    if device == "meta":
        return torch.empty(shape, dtype=torch.int64, device="meta")
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(num_ids, shape, generator=generator).to(device)


def random_values(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Return values from N(0, 1), the same on every device for one seed."""
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def check_tokens(tokens: int, max_tokens: int) -> None:
    """Raise UsageError when a sequence is longer than the model's position table."""
    if tokens > max_tokens:
        raise UsageError(
            f"{tokens} tokens do not fit this model, which has {max_tokens} positions",
            remedy=f"use at most {max_tokens}",
        )
