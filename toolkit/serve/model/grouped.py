"""Weights as small whole numbers with a scale per group of 32: as files hold them, and as made.

Shape suffixes: N outputs, K inputs, S = K / 32 groups of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

GROUP = 32
# What stands for the largest magnitude of a group: -127..127 at 8 bits, 0..15 at 4.
_TOP = {8: 127, 4: 15}


@dataclass(frozen=True)
class Grouped:
    """`scale x level`, plus a minimum at 4 bits: exactly what GGUF's Q8_0, Q4_0, Q4_1, Q4_K hold.

    `levels` `[N, K]` is int8 (-127..127) at 8 bits and uint8 (0..15) at 4; `scales` and `minima`
    (None at 8 bits) `[N, S]` are float32.
    """

    bits: int
    levels: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.levels.shape

    @property
    def fits_half(self) -> bool:
        """Whether half precision holds every scale and minimum exactly."""
        both = [self.scales] if self.minima is None else [self.scales, self.minima]
        return all(torch.equal(each.half().float(), each) for each in both)

    def dequantised(self) -> torch.Tensor:
        """Return the float32 matrix `[N, K]` these numbers stand for."""
        grouped = self.levels.float().unflatten(1, (-1, GROUP)) * self.scales.unsqueeze(-1)
        if self.minima is not None:
            grouped += self.minima.unsqueeze(-1)
        return grouped.flatten(1)

    def take(self, rows: torch.Tensor) -> Grouped:
        """Return the matrix made of these rows, in this order."""
        minima = None if self.minima is None else self.minima[rows]
        return Grouped(self.bits, self.levels[rows], self.scales[rows], minima)


Weight = torch.Tensor | Grouped


def dense(weight: Weight) -> torch.Tensor:
    """Return float32 `[N, K]`."""
    return weight.dequantised() if isinstance(weight, Grouped) else weight


def alike(weights: Sequence[Weight]) -> list[Weight]:
    """Return matrices that one product reads: grouped ones at the most bits that any of them has.

    A file such as Q4_K_M holds a layer's values finer than its queries and keys.
    """
    bits = {weight.bits for weight in weights if isinstance(weight, Grouped)}
    return [
        quantise(weight.dequantised(), max(bits))
        if isinstance(weight, Grouped) and weight.bits < max(bits)
        else weight
        for weight in weights
    ]


def joined(weights: Sequence[Weight]) -> Weight:
    """Stack matrices that read the same input; grouped if all are."""
    weights = alike(weights)
    grouped = [weight for weight in weights if isinstance(weight, Grouped)]
    if len(grouped) < len(weights):
        return torch.cat([dense(weight) for weight in weights])
    minima = [weight.minima for weight in grouped if weight.minima is not None]
    return Grouped(
        grouped[0].bits,
        torch.cat([weight.levels for weight in grouped]),
        torch.cat([weight.scales for weight in grouped]),
        torch.cat(minima) if minima else None,
    )


def quantise(weight_NK: torch.Tensor, bits: int) -> Grouped:
    """Round a float32 matrix to 8 or 4 bits, K padded with zeros to whole groups.

    Scales and minima are rounded to half precision first, so that they are stored exactly.
    """
    short = -weight_NK.shape[1] % GROUP
    groups_NSG = torch.nn.functional.pad(weight_NK, (0, short)).unflatten(1, (-1, GROUP))
    low = groups_NSG.amin(-1)
    span = groups_NSG.abs().amax(-1) if bits == 8 else groups_NSG.amax(-1) - low
    scales = (span / _TOP[bits]).half().float()
    minima = None if bits == 8 else low.half().float()
    start = groups_NSG if minima is None else groups_NSG - minima.unsqueeze(-1)
    # A scale of 0 stands for a group of equal values: its levels are 0.
    inverse = torch.where(scales > 0, 1 / scales, 0.0).unsqueeze(-1)
    levels = (start * inverse).round_().clamp_(-127 if bits == 8 else 0, _TOP[bits])
    kept = levels.to(torch.int8 if bits == 8 else torch.uint8)
    return Grouped(bits, kept.flatten(1), scales, minima)


def round_activations(x: torch.Tensor) -> torch.Tensor:
    """Return `x` `[rows, K]` as the integer kernels see it: 8 bits per row and group of 32."""
    groups = torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    most = groups.abs().amax(-1, keepdim=True)
    # A division, to the bit the kernels' own: torch writes 127 / x as 127 times a reciprocal.
    inverse = torch.where(most > 1e-30, torch.full_like(most, 127).div(most), 0.0)
    return ((groups * inverse).round() * (most / 127)).flatten(1)[:, : x.shape[1]]


def from_gguf(kind: str, data: np.ndarray) -> Grouped | None:
    """Return a GGUF tensor's blocks `[N, bytes]` as they are, or None for types not held here."""
    if kind == "Q8_0":
        blocks = torch.from_numpy(np.array(data)).unflatten(1, (-1, 34))
        levels = blocks[..., 2:].contiguous().view(torch.int8)
        return Grouped(8, levels.flatten(1), _half(blocks[..., :2]))
    if kind in ("Q4_0", "Q4_1"):
        header = 2 if kind == "Q4_0" else 4
        blocks = torch.from_numpy(np.array(data)).unflatten(1, (-1, header + 16))
        packed, scales = blocks[..., header:], _half(blocks[..., :2])
        minima = scales * -8 if kind == "Q4_0" else _half(blocks[..., 2:4])
        levels = torch.cat((packed & 15, packed >> 4), dim=-1)
        return Grouped(4, levels.flatten(1), scales, minima)
    if kind == "Q4_K":
        return _q4_k(torch.from_numpy(np.array(data)).unflatten(1, (-1, 144)))
    return None


def _half(pair: torch.Tensor) -> torch.Tensor:
    """Return `[..., 2]` bytes as the half-precision numbers they are, in float32."""
    return pair.contiguous().view(torch.float16).squeeze(-1).float()


def _q4_k(blocks: torch.Tensor) -> Grouped:
    """Super-blocks of 256: two halves that scale eight 6-bit scales and eight 6-bit minima."""
    scale, minimum, packed = _half(blocks[..., :2]), _half(blocks[..., 2:4]), blocks[..., 4:16]
    low, high, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    # The first four are the low 6 bits of a byte; the others a nibble and two spare bits.
    scales = torch.cat((low & 63, (rest & 15) | (low >> 6 << 4)), dim=-1)
    minima = torch.cat((high & 63, (rest >> 4) | (high >> 6 << 4)), dim=-1)
    quads = blocks[..., 16:].unflatten(-1, (4, 32))
    levels = torch.stack((quads & 15, quads >> 4), dim=-2)
    return Grouped(
        4,
        levels.flatten(1),
        (scale.unsqueeze(-1) * scales.float()).flatten(1),
        (minimum.unsqueeze(-1) * -minima.float()).flatten(1),
    )
