"""A segment: one file of lists, each a contiguous, aligned block that one long read fetches.

    0       header: magic, version, shapes, id range, checksums                      (4 KiB)
    4 KiB   table: offset, number of vectors and XXH3-64 of every list     (padded to 4 KiB)
    ...     list 0, list 1, ...: ids int64 [n], padded to 64 B | codes uint8 [n, C]
            (each padded to 4 KiB)

Lists follow one another in the order of their numbers, which is the quantizer's tour: lists that
one query probes are near one another, and neighbours can be read in one go. Little endian. A list
is checked whenever it is read; header and table are checked when the file is opened.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import TypeVar

import numpy as np

from toolkit.errors import FormatError, ToolkitError
from toolkit.rag.disk import ALIGN_BYTES, DirectFile, checksum
from toolkit.rag.quantizer import Quantizer

_MAGIC, _VERSION = b"TKLISTS", 1
_HEADER = np.dtype(
    [
        ("magic", "S8"), ("version", "<u4"), ("num_lists", "<u4"), ("code_bytes", "<u8"),
        ("num_vectors", "<u8"), ("num_bytes", "<u8"), ("first_id", "<i8"), ("end_id", "<i8"),
        ("quantizer", "<u8"), ("table", "<u8"), ("checksum", "<u8"),
    ]
)  # fmt: skip
_ROW = np.dtype([("offset", "<u8"), ("num", "<u8"), ("checksum", "<u8")])
Size = TypeVar("Size", int, np.ndarray)
_REMEDY = "restore the file, or build the index again"


def padded(num_bytes: Size) -> Size:
    """Return the bytes a block takes on disk and in memory: the next multiple of 4 KiB.

    Takes an int, or an array of them.

    >>> [padded(n) for n in (0, 1, 4096, 4097)], padded(np.array([1, 5000])).tolist()
    ([0, 4096, 4096, 8192], [4096, 8192])
    """
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES


def _codes_at(num: Size) -> Size:
    """Return where the codes of `num` vectors begin in their block: where a cache line does."""
    return -(-8 * num // 64) * 64


class SegmentWriter:
    """Writes a segment list by list, in the order of their numbers, holding one at a time."""

    def __init__(self, path: Path, quantizer: Quantizer) -> None:
        """Begin the file at `path`, which nothing may refer to before `finish` has returned."""
        self.path = path
        self.num_vectors = 0
        self._quantizer = quantizer
        self._table = np.zeros(quantizer.num_lists, _ROW)
        self._next = 0
        self._file = path.open("wb")
        self._end = ALIGN_BYTES + padded(self._table.nbytes)
        self._file.seek(self._end)

    def append(self, number: int, ids: np.ndarray, codes: np.ndarray) -> None:
        """Write list `number`: ids int64 [n], ascending, and codes uint8 [n, C]."""
        assert number >= self._next, "lists come in the order of their numbers"
        assert codes.shape == (len(ids), self._quantizer.code_bytes)
        self._next = number + 1
        if not len(ids):
            return
        data = ids.astype("<i8").tobytes().ljust(_codes_at(len(ids)), b"\0") + codes.tobytes()
        data = data.ljust(padded(len(data)), b"\0")
        self._file.write(data)
        self._table[number] = (self._end, len(ids), checksum(data))
        self._end += len(data)
        self.num_vectors += len(ids)

    def finish(self, first_id: int, end_id: int) -> str:
        """Complete the file for ids in [first_id, end_id), on disk before this returns.

        Returns the header's checksum, which stands for the table's and so for every list's.
        """
        header = np.zeros((), _HEADER)
        header["magic"], header["version"] = _MAGIC, _VERSION
        header["num_lists"] = self._quantizer.num_lists
        header["code_bytes"] = self._quantizer.code_bytes
        header["num_vectors"], header["num_bytes"] = self.num_vectors, self._end
        header["first_id"], header["end_id"] = first_id, end_id
        header["quantizer"] = self._quantizer.checksum
        header["table"] = checksum(self._table.tobytes())
        header["checksum"] = _header_checksum(header)
        self._file.truncate(self._end)  # the file may end with a table and no lists
        self._file.seek(0)
        self._file.write(header.tobytes().ljust(ALIGN_BYTES, b"\0"))
        self._file.write(self._table.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return f"{int(header['checksum']):016x}"

    def close(self) -> None:
        """Let go of the file, finished or not."""
        self._file.close()


class Segment:
    """An open segment. `nums[i]` vectors are in list i, in `sizes[i]` bytes at `offsets[i]`."""

    def __init__(self, path: Path, quantizer: Quantizer) -> None:
        """Open and check header and table.

        Raises FormatError naming the file when it is missing, torn, altered, of another version,
        or of another index.
        """
        self.path = path
        self._code_bytes = quantizer.code_bytes
        header, table = _read_front(path)
        if header["quantizer"] != quantizer.checksum:
            raise FormatError(f"{path} belongs to another index", remedy=_REMEDY)
        self.checksum = f"{int(header['checksum']):016x}"
        self.first_id, self.end_id = int(header["first_id"]), int(header["end_id"])
        self.num_vectors = int(header["num_vectors"])
        self.nums = table["num"].astype(np.int64)
        self.offsets = table["offset"].astype(np.int64)
        self.sizes = padded(_codes_at(self.nums) + self.nums * self._code_bytes)
        self._checksums = table["checksum"]
        self.file = DirectFile(path)

    def check(self, number: int, block: np.ndarray) -> None:
        """Compare a list's bytes (uint8 [sizes[number]]) with its checksum.

        Raises FormatError naming the file and the list.
        """
        if checksum(block) != self._checksums[number]:
            raise FormatError(
                f"{self.path} is corrupt in list {number} (bytes {self.offsets[number]} to "
                f"{self.offsets[number] + self.sizes[number]})",
                remedy=_REMEDY,
            )

    def split(self, number: int, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return views (ids int64 [n], codes uint8 [n, C]) into a list's bytes."""
        num = int(self.nums[number])
        start = _codes_at(num)
        codes = block[start : start + num * self._code_bytes]
        return block[: 8 * num].view(np.int64), codes.reshape(num, self._code_bytes)

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Read and check one list outside any tier: (ids, codes), in memory of their own."""
        size = int(self.sizes[number])
        if size == 0:
            return self.split(number, np.empty(0, np.uint8))
        block = np.frombuffer(mmap.mmap(-1, size), np.uint8)  # aligned, as direct reads demand
        self.file.read(int(self.offsets[number]), [block.data])
        self.check(number, block)
        return self.split(number, block)

    def verify(self) -> list[FormatError]:
        """Read every list; return an error for each one that is not what was written."""
        bad = []
        for number in np.flatnonzero(self.nums):
            try:
                self.read(int(number))
            except FormatError as error:
                bad.append(error)
        return bad

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _read_front(path: Path) -> tuple[np.void, np.ndarray]:
    """Return the header and the table of a segment, checked."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER.itemsize)
            if len(head) < _HEADER.itemsize or head[: len(_MAGIC)] != _MAGIC:
                raise FormatError(f"{path} is not a segment of lists", remedy=_REMEDY)
            header = np.frombuffer(head, _HEADER)[0]
            if header["version"] != _VERSION:
                raise FormatError(
                    f"{path} is version {header['version']} of the segment format, this toolkit "
                    f"reads version {_VERSION}",
                    remedy="build the index again",
                )
            if header["checksum"] != _header_checksum(header):
                raise FormatError(f"{path} is corrupt in its header", remedy=_REMEDY)
            size = path.stat().st_size
            if size != header["num_bytes"]:
                raise FormatError(
                    f"{path} is torn: {size} bytes where its header says {header['num_bytes']}",
                    remedy=_REMEDY,
                )
            file.seek(ALIGN_BYTES)
            rows = file.read(int(header["num_lists"]) * _ROW.itemsize)
    except FileNotFoundError as error:
        raise FormatError(f"{path} is missing", remedy=_REMEDY) from error
    except OSError as error:
        raise ToolkitError(f"cannot read {path}: {error.strerror}") from error
    if header["table"] != checksum(rows):
        raise FormatError(f"{path} is corrupt in its table of lists", remedy=_REMEDY)
    return header, np.frombuffer(rows, _ROW)


def _header_checksum(header: np.ndarray | np.void) -> int:
    return checksum(header.tobytes()[: -_HEADER["checksum"].itemsize])
