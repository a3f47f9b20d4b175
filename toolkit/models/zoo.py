"""The zoo: every named configuration of every family."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from toolkit.errors import unknown_name
from toolkit.models import evoformer, gpt, llama, swin, t5
from toolkit.models.init import initialise, materialise
from toolkit.models.model import Model, Stack, count_parameters

# A family is a file with FAMILY, CONFIGS, build(config) and inputs(config, sizes, ...), and STACK,
# the path of its blocks, where tracing all of them takes long (see model.Stack).
FAMILIES = (gpt, llama, swin, evoformer, t5)


def names() -> tuple[str, ...]:
    """Return the names of the zoo, family by family, small to large."""
    return tuple(name for family in FAMILIES for name in family.CONFIGS)


def find(name: str, **changes: Any) -> Model:
    """Return the model called `name`, with some numbers of its configuration changed.

    >>> find("llama3-70b", num_layers=2).config.num_layers
    2
    """
    for family in FAMILIES:
        if name in family.CONFIGS:
            return _model(name, family, family.CONFIGS[name], changes)
    raise unknown_name("model", name, names())


def _model(name: str, family: Any, config: Any, changes: dict[str, Any]) -> Model:
    for key in changes:
        known = [item.name for item in fields(config)]
        if key not in known:
            raise unknown_name(f"number of {name}", key, known)
    if changes:
        config = replace(config, **changes)

    def builder(device: str, dtype: torch.dtype, seed: int) -> nn.Module:
        # Made without memory first: torch's own initial values would be drawn and thrown away.
        with torch.device("meta"):
            module: nn.Module = family.build(config).to(dtype)
        if device == "meta":
            return module
        return initialise(materialise(module, device), seed=seed)

    def counter() -> int:
        return _count(family, config)

    return Model(
        name=name,
        family=family.FAMILY,
        config=config,
        sizes=config.sizes,
        source=config.source,
        summary=config.summary,
        builder=builder,
        inputs=lambda sizes, device, dtype, seed, targets: family.inputs(
            config, sizes, device=device, dtype=dtype, seed=seed, targets=targets
        ),
        counter=counter,
        stack=_stack(name, family, config),
    )


def _stack(name: str, family: Any, config: Any) -> Stack | None:
    path = getattr(family, "STACK", None)
    if path is None:
        return None
    return Stack(
        path,
        config.num_layers,
        lambda num_blocks: _model(name, family, config, {"num_layers": num_blocks}),
    )


def _count(family: Any, config: Any) -> int:
    """Count on the meta device; of many equal layers two are enough to know the rest."""

    def count(made: Any) -> int:
        with torch.device("meta"):
            return count_parameters(family.build(made))

    num_layers = getattr(config, "num_layers", 0)
    if num_layers <= 2:
        return count(config)
    one, two = (count(replace(config, num_layers=layers)) for layers in (1, 2))
    return one + (num_layers - 1) * (two - one)
