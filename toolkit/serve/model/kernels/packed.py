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


def pack(weight: Weight, library: Library, bias: torch.Tensor | None = None) -> PackedMatrix:
    """Lay a weight `[out, in]` out in panels; outputs are padded with zeros to whole panels."""
    rows, columns = weight.shape
    short = -rows % library.panel
    padded_bias = None if bias is None else aligned(F.pad(bias, (0, short)))
    if isinstance(weight, Grouped):
        kind, panels = _grouped(weight, short, library)
    else:
        kind = Format.FLOAT32
        panels = F.pad(weight, (0, 0, 0, short)).unflatten(0, (-1, library.panel)).transpose(1, 2)
    return PackedMatrix(kind, rows, rows + short, columns, aligned(panels), padded_bias)


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


def aligned(values: torch.Tensor) -> np.ndarray:
    """Return a contiguous copy that begins on a cache line, on large pages where there are any."""
    size = values.numel() * values.element_size()
    # numpy asks the system for large pages, torch does not.
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    held = room[start : start + size].view(torch.empty(0, dtype=values.dtype).numpy().dtype)
    torch.from_numpy(held).view(values.shape).copy_(values)
    return held
