"""The model zoo and where weights come from.

`load(ref)` gives a `Model` to build and trace; `weights.get` and `weights.resolve` give files.
Torch is imported at the first use of a name below, not before: `weights` does without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.models.init import initialise, materialise
    from toolkit.models.model import Model
    from toolkit.models.references import load
    from toolkit.models.zoo import names

_HOME = {
    "Model": "model",
    "initialise": "init",
    "materialise": "init",
    "load": "references",
    "names": "zoo",
}

__all__ = ["Model", "initialise", "load", "materialise", "names"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"toolkit.models.{_HOME[name]}"), name)
    raise AttributeError(f"module 'toolkit.models' has no attribute {name!r}")
