"""Text for training: the standard library's own words by default, as bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from toolkit.errors import UsageError, require

VOCABULARY = 256
_COLUMN = "text"


class Text:
    """One long run of bytes; `batch(step)` is a pure function of (seed, step).

    Every rank therefore sees the same global batch, in any order of restarts and under any plan.
    """

    def __init__(self, data: bytes, source: str) -> None:
        self.source = source
        self.digest = hashlib.sha256(data).hexdigest()[:16]
        self._ids = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self._ids)

    def batch(self, step: int, *, batch: int, tokens: int, seed: int) -> dict[str, torch.Tensor]:
        """Return ids and next-byte targets, each [batch, tokens], of step number `step`."""
        if len(self) <= tokens:
            raise UsageError(f"{self.source} holds {len(self)} bytes, too few for {tokens} tokens")
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(self) - tokens, (batch,), generator=generator)
        window = starts[:, None] + torch.arange(tokens + 1)
        ids = self._ids[window].long()
        return {"ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}


def standard_library(*, max_bytes: int = 8_000_000) -> Text:
    """Return the text every CPython carries: its language reference, then its sources."""
    import os
    import pydoc_data.topics
    import sysconfig

    pieces = [text.encode() for _, text in sorted(pydoc_data.topics.topics.items())]
    size = sum(map(len, pieces))
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if size >= max_bytes:
            break
        inside = path.relative_to(root).parts
        if inside[0] not in ("site-packages", "dist-packages", "test") and os.access(path, os.R_OK):
            pieces.append(path.read_bytes())
            size += len(pieces[-1])
    return Text(b"\n\n".join(pieces)[:max_bytes], "the standard library")


def load(source: str | None, *, max_bytes: int = 8_000_000) -> Text:
    """Return text from a file, a folder of text files, or a Hugging Face dataset's `text` column.

    None is the standard library. Raises UsageError when there is no text there, MissingExtraError
    when `datasets` is needed and not installed.
    """
    if source is None:
        return standard_library(max_bytes=max_bytes)
    path = Path(source)
    if path.is_file() and path.suffix not in (".json", ".jsonl", ".parquet", ".csv"):
        return Text(path.read_bytes()[:max_bytes], source)
    parts = [text.encode() for text in _rows(source, path, max_bytes)]
    if not parts:
        raise UsageError(f"{source} holds no text")
    return Text(b"\n\n".join(parts)[:max_bytes], source)


def _rows(source: str, path: Path, max_bytes: int) -> Iterator[str]:
    size = 0
    for row in _dataset(source, path):
        if _COLUMN not in row:
            raise UsageError(
                f"{source} has no column {_COLUMN!r}",
                remedy=f"its columns are: {', '.join(row)}; rename one to {_COLUMN!r}",
            )
        yield row[_COLUMN]
        size += len(row[_COLUMN])
        if size >= max_bytes:
            return


def _dataset(source: str, path: Path) -> Any:
    datasets = require("datasets", extra="train")
    kinds = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
    try:
        if path.is_file():
            return datasets.load_dataset(
                kinds[path.suffix], data_files=str(path), split="train", streaming=True
            )
        if path.is_dir():
            return datasets.load_dataset("text", data_dir=str(path), split="train", streaming=True)
        return datasets.load_dataset(source, split="train", streaming=True)
    except Exception as error:
        raise UsageError(
            f"cannot read dataset {source!r}: {error}",
            remedy="give a file, a folder of text files, or the name of a Hugging Face dataset "
            "with a train split (which needs a network)",
        ) from error
