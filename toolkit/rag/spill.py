"""Vectors on their way into lists: a sort by list whose memory does not grow with the corpus.

Vectors come in the order of their ids and leave in the order of their lists. They are assigned and
encoded as they come, and appended to one of a few files, each for a run of neighbouring lists; then
file after file is sorted in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from toolkit import units
from toolkit.errors import UsageError
from toolkit.rag.quantizer import Quantizer

MEMORY_BYTES = 256 * units.MIB
_NUM_FILES = 64


class Spill:
    """The files of one sort. Shapes: N vectors, D dims, C bytes a code."""

    def __init__(
        self, folder: Path, quantizer: Quantizer, *, memory_bytes: int = MEMORY_BYTES
    ) -> None:  # fmt: skip
        """Sort below `folder`, which is the caller's to delete, in about `memory_bytes`.

        One list is always held whole, however large it is.
        """
        self._quantizer = quantizer
        self._record = np.dtype(
            [("list", "<i4"), ("id", "<i8"), ("code", "u1", (quantizer.code_bytes,))]
        )
        self._most = max(1, memory_bytes // (4 * self._record.itemsize))  # of it, sorting copies
        self._nums = np.zeros(quantizer.num_lists, np.int64)
        num_files = min(_NUM_FILES, quantizer.num_lists)
        # File i takes the lists from bounds[i] up to bounds[i + 1].
        self._bounds = np.linspace(0, quantizer.num_lists, num_files + 1).astype(np.int64)
        folder.mkdir(parents=True, exist_ok=True)
        self._paths = [folder / f"{i:02d}.spill" for i in range(num_files)]
        self._files = [path.open("wb") for path in self._paths]

    def append(self, vectors_ND: np.ndarray, first_id: int) -> None:  # noqa: N803
        """Take float32 vectors [N, D] with ids from `first_id` on.

        Raises UsageError when they have another width or values that are not finite.
        """
        if vectors_ND.ndim != 2 or vectors_ND.shape[1] != self._quantizer.dims:
            raise UsageError(
                f"vectors of shape {vectors_ND.shape} for an index of {self._quantizer.dims} dims"
            )
        for start in range(0, len(vectors_ND), self._most):
            part_ND = vectors_ND[start : start + self._most].astype(np.float32)  # noqa: N806
            if not np.isfinite(part_ND).all():
                wrong = start + int(np.flatnonzero(~np.isfinite(part_ND).all(axis=1))[0])
                raise UsageError(f"vector {first_id + wrong} has values that are not finite")
            records = np.empty(len(part_ND), self._record)
            records["list"] = self._quantizer.assign(part_ND)
            records["id"] = np.arange(len(part_ND)) + first_id + start
            records["code"] = self._quantizer.encode(part_ND)
            self._nums += np.bincount(records["list"], minlength=len(self._nums))
            into = np.searchsorted(self._bounds, records["list"], side="right") - 1
            for number in np.unique(into):
                self._files[number].write(records[into == number].tobytes())

    def lists(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (list, ids int64 [n], codes uint8 [n, C]) of all lists that are not empty.

        Lists ascend, and ids inside a list. Nothing can be appended afterwards.
        """
        self.close()
        for path, low, high in zip(self._paths, self._bounds, self._bounds[1:], strict=False):
            for first, end in self._runs(int(low), int(high)):
                records = self._select(path, first, end)
                ends = np.cumsum(self._nums[first:end])
                for number, stop in zip(range(first, end), ends, strict=True):
                    mine = records[stop - self._nums[number] : stop]
                    if len(mine):
                        yield number, mine["id"].copy(), mine["code"].copy()
            path.unlink()

    def _runs(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        """Divide the lists [low, high) into runs that are sorted in memory together."""
        first, held = low, 0
        for number in range(low, high):
            if number > first and held + self._nums[number] > self._most:
                yield first, number
                first, held = number, 0
            held += int(self._nums[number])
        yield first, high

    def _select(self, path: Path, first: int, end: int) -> np.ndarray:
        """Return the records of lists [first, end), sorted by list; ids stay in their order."""
        parts = []
        with path.open("rb") as file:
            while len(records := np.fromfile(file, self._record, self._most)):
                parts.append(records[(records["list"] >= first) & (records["list"] < end)])
        chosen = np.concatenate(parts) if parts else np.empty(0, self._record)
        return chosen[np.argsort(chosen["list"], kind="stable")]

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()
