"""A reference names a model: a zoo name, `hf:<hub id or folder>`, or `module:factory`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolkit.errors import UsageError
from toolkit.models import factory, huggingface, zoo
from toolkit.models.model import Model


def load(ref: str, **changes: Any) -> Model:
    """Return the model that `ref` names; nothing is built yet.

    - a zoo name (`toolkit.models.names()`); `changes` alter numbers of its configuration, e.g.
      `load("llama3-70b", num_layers=2)`;
    - `hf:<hub id or folder>`: a transformers model, unmodified; a folder with only a config.json
      is enough;
    - `module:factory`: any callable that returns a module, see `toolkit.models.factory`.

    Raises UsageError for an unknown name (saying which is nearest), a missing folder, or a factory
    that is not one; FormatError for a corrupt config.json; ToolkitError when the hub cannot be
    reached; MissingExtraError when transformers is needed and not installed.
    """
    if ":" not in ref:
        if "/" in ref or Path(ref).is_dir():
            raise UsageError(
                f"{ref!r} is not a name in the zoo", remedy=f"for a transformers model: hf:{ref}"
            )
        return zoo.find(ref, **changes)
    if changes:
        raise UsageError(
            f"{ref} has no zoo configuration to change ({', '.join(changes)})",
            remedy="change it where it is defined",
        )
    if ref.startswith("hf:"):
        return huggingface.load(ref)
    return factory.load(ref)
