"""A model's weights and shape, from a GGUF file or a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from toolkit.errors import UsageError
from toolkit.serve.model import gguf_file, huggingface
from toolkit.serve.model.loaded import LoadedModel
from toolkit.serve.model.part import Part


def load(path: Path, *, keep_blocks: bool = False, part: Part | None = None) -> LoadedModel:
    """Read a `.gguf` file or a Hugging Face folder.

    Weights are float32 tensors; with `keep_blocks`, those that a GGUF file holds in groups of 32
    at 4 or 8 bits stay as they are. With `part` only a rank's share is kept, and the shape returned
    is what that rank computes.

    Raises UsageError for a missing path or an unsupported architecture, FormatError for a file
    that is torn, corrupt or not what its configuration says, InfeasibleError where it cannot be
    divided.
    """
    if path.is_dir():
        return huggingface.load(path, part)
    if path.is_file():
        return gguf_file.load(path, part, keep_blocks=keep_blocks)
    raise UsageError(f"no such model: {path}", remedy="give a GGUF file or a Hugging Face folder")
