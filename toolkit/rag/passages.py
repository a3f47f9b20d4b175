"""Passages on disk: one JSON object a line and an array of offsets, so that text is read on demand.

A hundred million passages cost 8 bytes each in the offsets file, which is mapped, not read.
"""

from __future__ import annotations

import array
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
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
    first_id: int = 0,
    end_id: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write passages with ascending ids in [first_id, end_id) into `folder`; return their number.

    An id that is left out is one that was deleted, and costs its offset only. `end_id` defaults to
    the one after the last.
    """
    offsets = array.array("q", [0])
    num_passages = 0

    def skip_to(passage_id: int) -> None:
        missing = passage_id - first_id - (len(offsets) - 1)
        assert missing >= 0, "passages come in the order of their ids"
        offsets.extend(offsets[-1:] * missing)

    with record.atomic(folder / PASSAGES) as file:
        for passage in passages:
            skip_to(passage.id)
            fields = asdict(passage)
            if not passage.meta:
                del fields["meta"]
            line = json.dumps(fields, ensure_ascii=False).encode() + b"\n"
            file.write(line)
            offsets.append(offsets[-1] + len(line))
            num_passages += 1
            if progress:
                progress(1)
        if end_id is not None:
            skip_to(end_id)
    with record.atomic(folder / OFFSETS) as file:
        np.save(file, np.array(offsets, dtype=np.int64))
    return num_passages


def numbered(passages: Iterable[Passage]) -> Iterator[Passage]:
    """Yield passages with ids from 0 on."""
    for passage_id, passage in enumerate(passages):
        yield passage if passage.id == passage_id else replace(passage, id=passage_id)


class PassageFile:
    """Passages by id, read from disk when asked for."""

    def __init__(self, folder: Path, first_id: int = 0) -> None:
        """Open the two files, for ids from `first_id` on.

        Raises FormatError when they do not belong together.
        """
        self.path = folder / PASSAGES
        self.first_id = first_id
        try:
            self._offsets = np.load(folder / OFFSETS, mmap_mode="r")
            self._file = self.path.open("rb")
        except FileNotFoundError as error:
            raise FormatError(
                f"{error.filename} is missing", remedy="build the index again"
            ) from error
        except (ValueError, EOFError) as error:
            raise FormatError(f"{folder / OFFSETS} is corrupt: {error}") from error
        size = self.path.stat().st_size
        if self._offsets.ndim != 1 or len(self._offsets) < 1 or self._offsets[-1] != size:
            raise FormatError(f"{folder / OFFSETS} does not belong to {self.path} ({size} bytes)")

    def __len__(self) -> int:
        """Return the number of ids, those of deleted passages among them."""
        return len(self._offsets) - 1

    def __getitem__(self, passage_id: int) -> Passage:
        """Return one passage. Raises FormatError when its line is not what was written."""
        row = passage_id - self.first_id
        if not 0 <= row < len(self):
            raise IndexError(
                f"passage {passage_id} of {self.first_id} to {self.first_id + len(self) - 1}"
            )
        start, end = (int(value) for value in self._offsets[row : row + 2])
        if start == end:
            raise IndexError(f"passage {passage_id} was deleted")
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
        held = np.flatnonzero(np.diff(self._offsets))
        return (self[self.first_id + int(row)] for row in held)

    def close(self) -> None:
        """Close the text file."""
        self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()
