"""Initial weights that depend on a seed and a parameter's name alone, so any part can be made."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from torch import nn

_STD = 0.02  # GPT-2 and BERT; one rule for the whole zoo


def materialise(module: nn.Module, device: str | torch.device) -> nn.Module:
    """Give a module made on meta memory on `device`, not yet filled; return it.

    `nn.Module.to_empty` parts tied parameters; here what was shared stays shared.
    """
    paths: dict[int, list[str]] = {}
    for path, parameter in module.named_parameters(remove_duplicate=False):
        paths.setdefault(id(parameter), []).append(path)
    module.to_empty(device=device)
    for first, *others in paths.values():
        for other in others:
            owner, _, name = other.rpartition(".")
            setattr(module.get_submodule(owner), name, module.get_parameter(first))
    return module


def initialise(module: nn.Module, *, seed: int = 0, prefix: str = "") -> nn.Module:
    """Fill the parameters of a zoo module in place and return it.

    Matrices are drawn from N(0, 0.02), norms are one, biases zero. Each parameter has a generator
    of its own, seeded by `seed` and its qualified name, so that a pipeline stage holding a few
    blocks gets exactly the weights the whole model would have: pass the stage's `prefix`. A tied
    parameter has the name under which the module comes to it first (an embedding, before its head).
    """
    done: set[int] = set()
    with torch.no_grad():
        for owner, part in module.named_modules():
            is_norm = isinstance(part, nn.LayerNorm | nn.RMSNorm)
            for name, parameter in part.named_parameters(recurse=False):
                if id(parameter) in done:
                    continue
                if parameter.is_meta:
                    raise ValueError(f"{owner}.{name} has no memory: call materialise first")
                done.add(id(parameter))
                if name == "bias":
                    parameter.zero_()
                elif is_norm:
                    parameter.fill_(1.0)
                else:
                    path = ".".join(piece for piece in (prefix, owner, name) if piece)
                    mark = hashlib.sha256(f"{seed}/{path}".encode()).digest()
                    generator = torch.Generator(parameter.device)
                    generator.manual_seed(int.from_bytes(mark[:7], "big"))
                    parameter.normal_(0.0, _STD, generator=generator)
    return module


@contextlib.contextmanager
def seeded(device: str, seed: int) -> Iterator[None]:
    """Make new tensors on `device`, drawn from `seed`, and leave the global generators alone.

    For modules that are not ours, which draw their initial weights from the global generators.
    """
    place = torch.device(device)
    devices = [] if place.type in ("cpu", "meta") else [place]
    with torch.random.fork_rng(devices, device_type=place.type if devices else "cuda"), place:
        torch.manual_seed(seed)
        yield
