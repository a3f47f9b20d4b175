"""The disk tier: long reads past the page cache, straight into the buffers of the caller.

Direct reads (O_DIRECT) cost about a tenth of a core at 0.8 GB/s and leave no second copy in RAM.
Where the file system refuses them, reads are buffered and what they left in the page cache is
given up at once, so that a memory budget stays one.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from toolkit import units
from toolkit.errors import FormatError, ToolkitError, require

ALIGN_BYTES = 4096  # what direct reads demand of offset, length and address
READ_BYTES = units.MIB  # of one read; 256 KiB to 1 MiB is where this stops mattering
_MOST_BUFFERS = 512  # of one call: half of Linux's IOV_MAX


def checksum(data: bytes | memoryview | np.ndarray) -> int:
    """Return the XXH3-64 of some bytes: 10 GB/s and more, so that every read can be checked."""
    return int(require("xxhash", extra="rag").xxh3_64_intdigest(data))


class DirectFile:
    """A file opened for aligned reads. Threads may share it."""

    def __init__(self, path: Path) -> None:
        """Open `path`. Raises FormatError when it is missing, ToolkitError when it is locked."""
        self.path = path
        self.direct = hasattr(os, "O_DIRECT")
        try:
            self._handle = self._open()
        except FileNotFoundError as error:
            raise FormatError(f"{path} is missing", remedy="build the index again") from error
        except OSError as error:
            raise ToolkitError(f"cannot read {path}: {error.strerror}") from error

    def _open(self) -> int:
        if self.direct:
            try:
                return os.open(self.path, os.O_RDONLY | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.direct = False
        return os.open(self.path, os.O_RDONLY)

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers` with the bytes from `offset` on, in pieces of READ_BYTES.

        Offset, lengths and addresses are multiples of ALIGN_BYTES. Raises ToolkitError naming the
        file and the offset when the disk fails, FormatError when the file ends too early.
        """
        piece: list[memoryview] = []
        size = 0
        for buffer in buffers:
            done = 0
            while done < len(buffer):
                part = buffer[done : done + READ_BYTES - size]
                piece.append(part)
                size += len(part)
                done += len(part)
                if size == READ_BYTES or len(piece) == _MOST_BUFFERS:
                    self._fill(offset, piece)
                    offset, piece, size = offset + size, [], 0
        if piece:
            self._fill(offset, piece)

    def _fill(self, offset: int, piece: list[memoryview]) -> None:
        start = offset
        while piece:
            try:
                count = os.preadv(self._handle, piece, offset)
            except OSError as error:
                if error.errno == errno.EINVAL and self.direct:
                    self._fall_back()
                    continue
                raise ToolkitError(
                    f"cannot read {self.path} at byte {offset}: {error.strerror}",
                    remedy="check the disk, then restore the file or build the index again",
                ) from error
            if count == 0:
                raise FormatError(
                    f"{self.path} is torn: it ends at byte {offset}", remedy="build the index again"
                )
            offset += count
            while piece and count >= len(piece[0]):
                count -= len(piece.pop(0))
            if count:
                piece[0] = piece[0][count:]
        if not self.direct:
            os.posix_fadvise(self._handle, start, offset - start, os.POSIX_FADV_DONTNEED)

    def _fall_back(self) -> None:
        """Read through the page cache from now on: some file systems refuse only the read."""
        self.direct = False
        plain = os.open(self.path, os.O_RDONLY)
        os.dup2(plain, self._handle)
        os.close(plain)

    def close(self) -> None:
        """Close the file; a read that comes too late fails, and reads no other file's bytes."""
        handle, self._handle = self._handle, -1
        if handle != -1:
            os.close(handle)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self.close()


# Fills buffers from a file: DirectFile.read, or what stands in for a slower or a failing disk.
Read = Callable[[DirectFile, int, Sequence[memoryview]], None]


def throttled(
    bytes_per_s: float,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Read:
    """Return a `Read` that takes its time: a slower disk, simulated, for tests and small machines.

    Readers share the bandwidth: each waits until the bytes asked for so far could have come.
    """
    free_s = clock()  # when the simulated disk has delivered all it was asked for
    lock = threading.Lock()

    def read(file: DirectFile, offset: int, buffers: Sequence[memoryview]) -> None:
        nonlocal free_s
        with lock:
            free_s = max(free_s, clock()) + sum(map(len, buffers)) / bytes_per_s
            due_s = free_s
        file.read(offset, buffers)
        sleep(max(0.0, due_s - clock()))

    return read
