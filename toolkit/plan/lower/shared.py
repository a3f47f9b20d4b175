"""Collectives through memory, for ranks that are processes on one machine and compute on its CPUs.

Over loopback connections every byte goes through sockets, by the cores that the ranks compute on.
Here each rank's buffers lie in a file in memory that the others have open: a rank
reads its n-th of everybody's, and writes what comes out to all. It reads through the file rather
than mapping it, so what others hold never counts as its own.

Ranks meet when they get here, and not before: nothing runs beside a backward, which would take the
cores it runs on.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

FOLDER = Path("/dev/shm")
_ALIGNED = 64  # bytes
_CHUNK = 1 << 18  # bytes that are worked on at a time: two of them stay in a core's cache

# What a counter of calls sees of them (toolkit/plan/counting.py).
_LIBRARY = torch.library.Library("toolkit_c10d", "DEF")
for _kind in ("all_reduce", "reduce_scatter", "all_gather"):
    _LIBRARY.define(f"{_kind}(Tensor buffer, str group_name) -> ()")
    _LIBRARY.impl(_kind, lambda *_: None, "CompositeExplicitAutograd")


class Room:
    """This rank's buffers, and the files of the others'. All ranks must call everything together,
    with buffers of the same sizes.
    """

    def __init__(self, group: dist.ProcessGroup, memory: Tensor, files: Sequence[int]) -> None:
        self.group = group
        self.rank, self.num_ranks = dist.get_rank(group), len(files)
        self._memory = memory
        self._bytes = memory.numpy().data
        self._files = tuple(files)  # by rank in the group
        weakref.finalize(self, _close, self._files)
        self._stage = torch.empty(_CHUNK, dtype=torch.uint8)

    def all_reduce(self, buffers: Sequence[Tensor]) -> None:
        """Make every buffer the sum of all ranks' in place."""
        self._tell("all_reduce", buffers)
        dist.barrier(group=self.group)
        for buffer in buffers:
            begin, end = self._part(buffer.numel(), self.rank)
            for piece in _chunks(buffer[begin:end]):
                self._add_others(piece, piece)
                self._give(piece)
        dist.barrier(group=self.group)

    def reduce_scatter(self, buffers: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        """Make each of `parts` the sum of this rank's n-th of a buffer."""
        self._tell("reduce_scatter", buffers)
        dist.barrier(group=self.group)
        for buffer, part in zip(buffers, parts, strict=True):
            begin, end = self._part(buffer.numel(), self.rank)
            for piece, out in zip(_chunks(buffer[begin:end]), _chunks(part), strict=True):
                self._add_others(piece, out)
        dist.barrier(group=self.group)

    def all_gather(self, buffers: Sequence[Tensor]) -> None:
        """Fill every buffer with what its n-ths are on their ranks."""
        self._tell("all_gather", buffers)
        dist.barrier(group=self.group)
        for buffer in buffers:
            for rank in self._others():
                begin, end = self._part(buffer.numel(), rank)
                for piece in _chunks(buffer[begin:end]):
                    self._read(rank, self._span(piece), self._bytes[self._slice(piece)])
        dist.barrier(group=self.group)

    def _add_others(self, piece: Tensor, out: Tensor) -> None:
        """Write the sum of all ranks' `piece`, this one's first, to `out`."""
        begin, size = self._span(piece)
        stage = self._stage[:size]
        total = piece
        for rank in self._others():
            self._read(rank, (begin, size), stage.numpy().data)
            total = torch.add(total, stage.view(piece.dtype), out=out)

    def _give(self, piece: Tensor) -> None:
        begin, size = self._span(piece)
        for rank in self._others():
            done = 0
            while done < size:
                mine = self._bytes[begin + done : begin + size]
                done += os.pwrite(self._files[rank], mine, begin + done)

    def _read(self, rank: int, span: tuple[int, int], into: memoryview) -> None:
        begin, size = span
        done = 0
        while done < size:
            done += os.preadv(self._files[rank], [into[done:]], begin + done)

    def _others(self) -> Iterator[int]:
        return (rank for rank in range(self.num_ranks) if rank != self.rank)

    def _part(self, count: int, rank: int) -> tuple[int, int]:
        """(first, last + 1) of the elements of a buffer that fall to `rank`."""
        size = -(-count // self.num_ranks)
        return min(rank * size, count), min((rank + 1) * size, count)

    def _span(self, piece: Tensor) -> tuple[int, int]:
        """(offset, bytes) of a part of this rank's memory; the others' lies at the same place."""
        return int(
            piece.storage_offset()
        ) * piece.element_size(), piece.numel() * piece.element_size()

    def _slice(self, piece: Tensor) -> slice:
        begin, size = self._span(piece)
        return slice(begin, begin + size)

    def _tell(self, kind: str, buffers: Sequence[Tensor]) -> None:
        for buffer in buffers:
            getattr(torch.ops.toolkit_c10d, kind)(buffer, self.group.group_name)


def buffers(
    sizes: Sequence[tuple[int, torch.dtype]], device: torch.device, group: dist.ProcessGroup
) -> tuple[list[Tensor], Room | None]:
    """Return flat buffers of zeros, (elements, dtype) each, and where the group's ranks meet over
    them: None where they are not all on one machine's CPUs, or its memory for files is too small.

    All ranks of the group must call this, with the same sizes.
    """
    spans, total = [], 0
    for count, dtype in sizes:
        spans.append(total)
        total += -(-count * dtype.itemsize // _ALIGNED) * _ALIGNED
    if device.type != "cpu" or not total or dist.get_backend(group) != "gloo":
        return [torch.zeros(count, dtype=dtype, device=device) for count, dtype in sizes], None
    memory, room = _meet(total, group)
    if memory is None:
        return [torch.zeros(count, dtype=dtype) for count, dtype in sizes], None
    found = [
        memory[begin : begin + count * dtype.itemsize].view(dtype)
        for begin, (count, dtype) in zip(spans, sizes, strict=True)
    ]
    return found, room


def _meet(size: int, group: dist.ProcessGroup) -> tuple[Tensor | None, Room | None]:
    """Make this rank's memory and open the others'; nothing where that fails on any of them."""
    num_ranks = dist.get_world_size(group)
    if num_ranks == 1:
        return None, None
    own = _file(size)
    try:
        paths: list[Path | None] = [None] * num_ranks
        dist.all_gather_object(paths, own, group=group)
        files = [_opened(path, size) for path in paths]
        fits: list[bool] = [False] * num_ranks
        dist.all_gather_object(fits, all(file is not None for file in files), group=group)
        if not all(fits) or own is None:
            _close(file for file in files if file is not None)
            return None, None
        memory = torch.from_file(str(own), shared=True, size=size, dtype=torch.uint8)
        return memory, Room(group, memory, [file for file in files if file is not None])
    finally:
        if own is not None:
            own.unlink()  # what has it open keeps it; nothing is left when a rank is killed


def _file(size: int) -> Path | None:
    """Make a file of that many bytes of memory; None where there is no room for it."""
    try:
        handle, name = tempfile.mkstemp(prefix="toolkit-rank-", dir=FOLDER)
    except OSError:
        return None
    path = Path(name)
    try:
        os.posix_fallocate(handle, 0, size)  # or a full one would end the process when written to
    except OSError:
        path.unlink()
        return None
    finally:
        os.close(handle)
    return path


def _opened(path: Path | None, size: int) -> int | None:
    """Open another rank's file; None where it is not on this machine."""
    if path is None:
        return None
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return None
    if os.fstat(file).st_size == size:
        return file
    os.close(file)
    return None


def _close(files: Iterable[int]) -> None:
    for file in files:
        os.close(file)


def _chunks(buffer: Tensor) -> Iterator[Tensor]:
    yield from buffer.split(max(1, _CHUNK // buffer.element_size())) if buffer.numel() else ()
