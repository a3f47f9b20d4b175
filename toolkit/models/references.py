"""A reference names a model: a zoo name, `hf:<hub id or folder>`, or `module:factory`."""

from __future__ import annotations

from typing import Any

from toolkit.models import zoo
from toolkit.models.model import Model


def load(ref: str, **changes: Any) -> Model:
    """Return the model that `ref` names; nothing is built yet.

    `changes` alter numbers of a zoo configuration, e.g. `load("llama3-70b", num_layers=2)`.
    Raises UsageError for an unknown name (saying which is nearest), a missing folder, or a factory
    that is not one.
    """
    return zoo.find(ref, **changes)
