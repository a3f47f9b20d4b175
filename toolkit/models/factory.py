"""`module:factory`: anybody's model, from any callable that can be imported.

The factory returns an nn.Module, or `(module, args, kwargs)` with what to call it with. Those of
its parameters that have an integer default are the sizes that may vary:

    def make(batch: int = 1, tokens: int = 128):
        return MyModel(), (torch.zeros(batch, tokens, dtype=torch.long),), {}

It is called with the wanted device as torch's default, so modules made in it need no memory when
traced on "meta".
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from toolkit.errors import UsageError, unknown_name
from toolkit.models.init import seeded
from toolkit.models.inputs import Example
from toolkit.models.model import Model


def load(ref: str) -> Model:
    """Return the model of a `module:factory` reference; the factory is not called yet."""
    make = imported(ref)

    def call(sizes: Mapping[str, int], device: str, seed: int) -> tuple[nn.Module, Example | None]:
        return _call(ref, make, sizes, device, seed)

    def builder(device: str, dtype: torch.dtype, seed: int) -> nn.Module:
        module, _ = call({}, device, seed)
        if device != "meta" and any(tensor.is_meta for tensor in module.parameters()):
            raise UsageError(f"{ref} made its parameters on meta, and {device} was asked for")
        return module.to(device=device, dtype=dtype)

    def inputs(
        sizes: Mapping[str, int], device: str, dtype: torch.dtype, seed: int, targets: bool
    ) -> Example:
        _, example = call(sizes, device, seed)
        if example is None:
            raise UsageError(
                f"{ref} returns a module alone, and an example to call it with is needed",
                remedy="return (module, args, kwargs)",
            )

        def place(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(device, dtype if leaf.is_floating_point() else leaf.dtype)

        args, kwargs = pytree.tree_map(place, example)
        return args, kwargs

    return Model(
        name=ref,
        family="factory",
        config=None,
        sizes=_sizes(make),
        source=ref,
        summary=(inspect.getdoc(make) or "").partition("\n")[0],
        builder=builder,
        inputs=inputs,
    )


def imported(ref: str, what: str = "factory") -> Callable[..., Any]:
    """Return what `module:name` names, something to call; `what` it is, for messages.

    Raises UsageError when there is none.
    """
    module_name, _, attribute = ref.partition(":")
    if module_name.endswith(".py") or "/" in module_name:
        dotted = module_name.removesuffix(".py").strip("./").replace("/", ".")
        raise UsageError(
            f"{module_name!r} is a path, not a module", remedy=f"write {dotted}:{attribute}"
        )
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise UsageError(
            f"{ref!r} does not name a {'model' if what == 'factory' else what}",
            remedy="write a zoo name, hf:NAME or module:factory"
            if what == "factory"
            else f"write module:{what}",
        )
    # As `python -m` does: the user's own module lies in the current folder.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UsageError(
                f"no module named {error.name!r} (looked for {ref})",
                remedy=f"run from the folder that holds it, or set PYTHONPATH; now in {here}",
            ) from error
        raise UsageError(f"{module_name} needs {error.name!r}, which is not installed") from error
    except Exception as error:  # the user's module may raise anything
        raise UsageError(f"importing {module_name} raised {_said(error)}") from error
    if not hasattr(module, attribute):
        known = [name for name, value in vars(module).items() if callable(value)]
        raise unknown_name(f"{what} in {module_name}", attribute, known)
    found = getattr(module, attribute)
    if not callable(found):
        raise UsageError(f"{ref} is a {type(found).__name__}, not something to call")
    made: Callable[..., Any] = found
    return made


def _parameters(make: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(make).parameters
    except (TypeError, ValueError):  # some built-ins have none
        return {}


def _sizes(make: Callable[..., Any]) -> Mapping[str, int]:
    return {
        name: parameter.default
        for name, parameter in _parameters(make).items()
        if isinstance(parameter.default, int) and not isinstance(parameter.default, bool)
    }


def _call(
    ref: str, make: Callable[..., Any], sizes: Mapping[str, int], device: str, seed: int
) -> tuple[nn.Module, Example | None]:
    for name, parameter in _parameters(make).items():
        fixed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if parameter.default is inspect.Parameter.empty and parameter.kind not in fixed:
            raise UsageError(
                f"{ref} needs a value for {name!r}, and a factory is called without arguments",
                remedy=f"give {name!r} a default",
            )
    try:
        with seeded(device, seed):
            result = make(**sizes)
    except Exception as error:  # the user's factory may raise anything
        raise UsageError(f"{ref} raised {_said(error)}") from error
    if isinstance(result, nn.Module):
        return result, None
    if isinstance(result, tuple) and len(result) == 3:
        module, args, kwargs = result
        if isinstance(module, nn.Module) and isinstance(args, tuple) and isinstance(kwargs, dict):
            return module, (args, kwargs)
    raise UsageError(
        f"{ref} returned a {type(result).__name__}",
        remedy="return an nn.Module, or (module, args, kwargs) with a tuple and a dict",
    )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
