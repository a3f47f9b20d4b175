"""A model before it is built: its name, its numbers, how to make it and what to call it with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from toolkit.errors import UsageError, unknown_name
from toolkit.models.inputs import Example

# (device, dtype, seed) -> the module
Builder = Callable[[str, torch.dtype, int], nn.Module]
# (sizes, device, dtype, seed, with targets?) -> what it is called with
Inputs = Callable[[Mapping[str, int], str, torch.dtype, int, bool], Example]


def count_parameters(module: nn.Module) -> int:
    """Return the number of distinct parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class Stack:
    """A list of equal blocks that a model runs through in order: each reads of the others only the
    one before, and what comes after reads the last. `shallow(n)` is the same model with n of them.
    """

    path: str
    num_blocks: int
    shallow: Callable[[int], Model]


@dataclass(frozen=True)
class Model:
    """What `load` returns. Nothing is built, and no memory taken, until `build` is called.

    `sizes` are the sizes of an example that may vary, with their defaults ("batch", "tokens", ...).
    `config` is the family's dataclass, a transformers config, or None for a factory.
    """

    name: str
    family: str
    config: Any
    sizes: Mapping[str, int]
    source: str
    summary: str
    builder: Builder = field(repr=False)
    inputs: Inputs = field(repr=False)
    counter: Callable[[], int] | None = field(default=None, repr=False)  # a quicker count
    stack: Stack | None = field(default=None, repr=False)  # where most of its depth is

    def build(
        self,
        device: str | torch.device = "meta",
        dtype: torch.dtype = torch.float32,
        *,
        seed: int = 0,
    ) -> nn.Module:
        """Return a new module with random weights from `seed`; on "meta" it has shapes only."""
        return self.builder(str(device), dtype, seed)

    def example(
        self,
        batch: int | None = None,
        tokens: int | None = None,
        device: str | torch.device = "meta",
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        targets: bool = True,
        **sizes: int,
    ) -> Example:
        """Return `(args, kwargs)` to call the module with, random from `seed`.

        Sizes left out take the defaults in `self.sizes`; one this model does not have, or that is
        not positive, is a UsageError. With `targets` the call returns the training loss (where the
        model has one), without it the logits. `dtype` is that of images.
        """
        wanted = {"batch": batch, "tokens": tokens, **sizes}
        given = {name: size for name, size in wanted.items() if size is not None}
        for name, size in given.items():
            if name not in self.sizes:
                raise unknown_name(f"size of {self.name}", name, self.sizes)
            if size < 1:
                raise UsageError(f"{name} {size} is not a size", remedy="use 1 or more")
        return self.inputs({**self.sizes, **given}, str(device), dtype, seed, targets)

    @cached_property
    def num_parameters(self) -> int:
        """Distinct parameters, counted on the meta device; shared ones count once."""
        return self.counter() if self.counter else count_parameters(self.build())
