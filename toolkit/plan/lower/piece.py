"""A flat piece of a tensor as a checkpoint keeps it, so that any other plan can read it back.

torch's distributed checkpoint stores boxes: an offset and a size along every dim. Consecutive
elements of a row-major tensor are at most 2d - 1 boxes of it: the rest of a row, whole rows, the
beginning of a row, and so along each dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

# (offsets, sizes, how many elements lie before it in the piece)
Box = tuple[tuple[int, ...], tuple[int, ...], int]


def boxes(shape: Sequence[int], start: int, end: int) -> Iterator[Box]:
    """Yield the boxes that elements [start, end) of a row-major tensor fill, in order.

    >>> list(boxes((3, 4), 2, 9))
    [((0, 2), (1, 2), 0), ((1, 0), (1, 4), 2), ((2, 0), (1, 1), 6)]
    """
    if start >= end:
        return
    if not shape:
        yield (), (), 0
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row
    if first > last or (len(shape) > 1 and start // row == (end - 1) // row and end - start < row):
        place = start // row
        for offsets, sizes, before in boxes(shape[1:], start - place * row, end - place * row):
            yield (place, *offsets), (1, *sizes), before
        return
    if start < first * row:
        for offsets, sizes, before in boxes(shape[1:], start - (first - 1) * row, row):
            yield (first - 1, *offsets), (1, *sizes), before
    if first < last:
        zeros = (0,) * (len(shape) - 1)
        yield (first, *zeros), (last - first, *shape[1:]), first * row - start
    if last * row < end:
        for offsets, sizes, before in boxes(shape[1:], 0, end - last * row):
            yield (last, *offsets), (1, *sizes), last * row - start + before


class Piece(Tensor):
    """Elements [start, start + len(values)) of this rank's part of a tensor.

    The part has shape `part` and begins at `origin` in the whole tensor, of shape `shape`. It is a
    tensor by name alone: nothing can be computed with it. The three methods with underscores are
    what torch's checkpoint asks of a tensor that knows its chunks.
    """

    elements: Tensor
    _chunks: list[tuple[ChunkStorageMetadata, int]]

    @staticmethod
    def __new__(cls, values: Tensor, shape: tuple[int, ...], *_: Any) -> Piece:
        made: Piece = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=values.dtype, device=values.device
        )
        return made

    def __init__(
        self,
        values: Tensor,
        shape: tuple[int, ...],
        part: tuple[int, ...],
        origin: tuple[int, ...],
        start: int,
    ) -> None:
        self.elements = values
        self._chunks = [
            (
                ChunkStorageMetadata(
                    torch.Size([o + base for o, base in zip(offsets, origin, strict=True)]),
                    torch.Size(sizes),
                ),
                before,
            )
            for offsets, sizes, before in boxes(part, start, start + values.numel())
        ]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{func} of a piece, which is for checkpoints alone")

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(self.elements),
                    size=self.shape,
                ),
            )
            for chunk, _before in self._chunks
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk for chunk, _ in self._chunks]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for chunk, before in self._chunks:
            if chunk.offsets == index.offset:
                return self.elements[before : before + chunk.sizes.numel()].view(chunk.sizes)
        raise AssertionError(f"no chunk of this piece begins at {index.offset}")
