"""Passages on disk: one JSON object a line and an array of offsets, so that text is read on demand.

A hundred million passages cost 8 bytes each in the offsets file, which is mapped, not read.
"""

from __future__ import annotations

import array
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from toolkit import record
from toolkit.errors import FormatError
from toolkit.rag.corpus import Passage

PASSAGES, OFFSETS = "passages.jsonl", "offsets.npy"


def write(
    folder: Path,
    passages: Iterable[Passage],
    *,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write passages (ids 0, 1, 2, ...) into `folder`; return how many there were."""
    offsets = array.array("q", [0])
    with record.atomic(folder / PASSAGES) as file:
        for passage in passages:
            assert passage.id == len(offsets) - 1, "passages come in the order of their ids"
            line = json.dumps(asdict(passage), ensure_ascii=False).encode() + b"\n"
            file.write(line)
            offsets.append(offsets[-1] + len(line))
            if progress:
                progress(1)
    with record.atomic(folder / OFFSETS) as file:
        np.save(file, np.array(offsets, dtype=np.int64))
    return len(offsets) - 1


class PassageFile:
    """Passages by id, read from disk when asked for."""

    def __init__(self, folder: Path) -> None:
        """Open the two files. Raises FormatError when they do not belong together."""
        self.path = folder / PASSAGES
        self._file = self.path.open("rb")
        try:
            self._offsets = np.load(folder / OFFSETS, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise FormatError(f"{folder / OFFSETS} is corrupt: {error}") from error
        size = self.path.stat().st_size
        if self._offsets.ndim != 1 or len(self._offsets) < 1 or self._offsets[-1] != size:
            raise FormatError(f"{folder / OFFSETS} does not belong to {self.path} ({size} bytes)")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, passage_id: int) -> Passage:
        """Return one passage. Raises FormatError when its line is not what was written."""
        if not 0 <= passage_id < len(self):
            raise IndexError(f"passage {passage_id} of {len(self)}")
        start, end = (int(value) for value in self._offsets[passage_id : passage_id + 2])
        # pread leaves the file position alone, so threads may share the file.
        line = os.pread(self._file.fileno(), end - start, start)
        try:
            passage = Passage(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise FormatError(
                f"{self.path} is corrupt at byte {start} (passage {passage_id}): {error}",
                remedy="build the index again",
            ) from error
        if passage.id != passage_id:
            raise FormatError(f"{self.path}: passage {passage.id} where {passage_id} belongs")
        return passage

    def __iter__(self) -> Iterator[Passage]:
        return (self[i] for i in range(len(self)))

    def close(self) -> None:
        """Close the text file."""
        self._file.close()
