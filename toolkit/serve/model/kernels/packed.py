"""Weights in the byte order the kernels read: panels of outputs, see product.h.

Shapes: P panels of `panel` outputs, V = 2 vectors of a panel, A lanes of a vector, K inputs, S
groups of 32 inputs.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from toolkit.serve.model.cache import large_pages
from toolkit.serve.model.grouped import GROUP, Grouped, Weight
from toolkit.serve.model.kernels.library import CMatrix, Library


class Format(enum.IntEnum):
    """How a packed matrix holds its weights; the numbers are product.h's."""

    FLOAT32 = 0
    INT8 = 1
    INT4 = 2
    INT4_WIDE = 3


@dataclass(frozen=True)
class PackedMatrix:
    """A weight `[rows, columns]` and its bias as the kernels read them."""

    format: Format
    rows: int
    padded_rows: int
    columns: int
    panels: np.ndarray
    bias: np.ndarray | None

    @property
    def num_bytes(self) -> int:
        return self.panels.nbytes + (0 if self.bias is None else self.bias.nbytes)

    @property
    def c(self) -> CMatrix:
        """The structure that points here; this object must outlive it."""
        bias = None if self.bias is None else self.bias.ctypes.data
        return CMatrix(self.format, self.rows, self.columns, 0, self.panels.ctypes.data, bias)


class Arena:
    """Memory for packed weights, in few large pieces on large pages where the system has them.

    A step streams through all weights: on small pages it would look up a new one every 4 kB.
    """

    def __init__(self, piece_bytes: int = 64 << 20) -> None:
        self._piece_bytes, self._piece, self._used = piece_bytes, np.empty(0, np.uint8), 0

    def place(self, values: torch.Tensor) -> np.ndarray:
        """Return a contiguous copy of `values`, flat, that begins on a cache line."""
        size = values.numel() * values.element_size()
        if self._used + size > len(self._piece):
            self._piece = np.frombuffer(large_pages(max(size, self._piece_bytes)), np.uint8)
            self._used = 0
        room = self._piece[self._used : self._used + size]
        self._used += -(-size // 64) * 64
        held = torch.from_numpy(room).view(values.dtype)
        held.view(values.shape).copy_(values)
        return held.numpy()


def pack(
    weight: Weight, library: Library, bias: torch.Tensor | None = None, arena: Arena | None = None
) -> PackedMatrix:
    """Lay a weight `[out, in]` out in panels; outputs are padded with zeros to whole panels."""
    arena = arena or Arena(piece_bytes=0)
    rows, columns = weight.shape
    short = -rows % library.panel
    padded_bias = None if bias is None else arena.place(F.pad(bias, (0, short)))
    if isinstance(weight, Grouped):
        kind, panels = _grouped(weight, short, library)
    else:
        kind = Format.FLOAT32
        panels = F.pad(weight, (0, 0, 0, short)).unflatten(0, (-1, library.panel)).transpose(1, 2)
    return PackedMatrix(kind, rows, rows + short, columns, arena.place(panels), padded_bias)


def side_by_side(gate: Weight, up: Weight, library: Library) -> Weight:
    """Interleave two matrices so that each panel holds a vector of both; padded with zeros."""
    lanes = library.lanes
    if isinstance(gate, Grouped) and isinstance(up, Grouped) and gate.bits == up.bits:
        minima = None
        if gate.minima is not None and up.minima is not None:
            minima = _interleaved(gate.minima, up.minima, lanes)
        return Grouped(
            gate.bits,
            _interleaved(gate.levels, up.levels, lanes),
            _interleaved(gate.scales, up.scales, lanes),
            minima,
        )
    dense = [w.dequantised() if isinstance(w, Grouped) else w for w in (gate, up)]
    return _interleaved(dense[0], dense[1], lanes)


def _interleaved(first: torch.Tensor, second: torch.Tensor, lanes: int) -> torch.Tensor:
    short = (0, 0, 0, -first.shape[0] % lanes)
    pair = [F.pad(each, short).unflatten(0, (-1, lanes)) for each in (first, second)]
    return torch.stack(pair, dim=1).flatten(0, 2)


def _grouped(weight: Grouped, short: int, library: Library) -> tuple[Format, torch.Tensor]:
    """Return a panel's bytes `[P, S, bytes]`: scales, minima, levels of a group after another."""
    levels, scales, minima = (
        None if each is None else F.pad(each, (0, 0, 0, short)).unflatten(0, (-1, 2, library.lanes))
        for each in (weight.levels, weight.scales, weight.minima)
    )
    assert levels is not None
    assert scales is not None
    joined_k = library.joined_k if weight.bits == 8 else 4
    # [P, V, A, S, K / joined, joined]: within a group, inputs that are joined lie innermost.
    split = levels.unflatten(-1, (-1, GROUP // joined_k, joined_k))
    if weight.bits == 8:
        content = split.permute(0, 3, 4, 1, 2, 5).contiguous().view(torch.uint8)
        content = content ^ library.int8_zero  # 128 more is the highest bit turned over
        kind, scale_type = Format.INT8, torch.float16
        assert weight.fits_half, "8-bit scales are half precision in every file and in quantise()"
    else:
        low, high = split[:, 0], split[:, 1]
        content = (low | high << 4).permute(0, 2, 3, 1, 4)
        kind, scale_type = Format.INT4, torch.float16
        if not weight.fits_half:
            kind, scale_type = Format.INT4_WIDE, torch.float32
    parts = [scales] if minima is None else [scales, minima]
    heads = [
        part.permute(0, 3, 1, 2).flatten(2).to(scale_type).contiguous().view(torch.uint8)
        for part in parts
    ]
    return kind, torch.cat([*heads, content.flatten(2)], dim=-1)
