"""Made-up data with something to learn in it, for models whose real data cannot be carried along.

It shows that training works and loss falls; no figure on it says anything about the real task.
Every batch is a pure function of (seed, step), as `text.Text` is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The seed of what stays the same over a whole run: the classes' patterns.
_WORLD = 20_231


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


@dataclass(frozen=True)
class Images:
    """Images of `num_labels` classes: each class is a smooth pattern, drawn under noise."""

    side: int
    num_channels: int
    num_labels: int
    source: str = "synthetic images: one smooth pattern a class, under noise"

    @property
    def digest(self) -> str:
        return f"images-{self.side}-{self.num_channels}-{self.num_labels}"

    def batch(self, step: int, *, batch: int, seed: int) -> dict[str, Tensor]:
        """Return image_BCII and labels_B."""
        generator = _generator(seed, step)
        labels = torch.randint(self.num_labels, (batch,), generator=generator)
        shape = (batch, self.num_channels, self.side, self.side)
        noise = torch.randn(shape, generator=generator)
        return {"image_BCII": self._patterns()[labels] + noise, "labels_B": labels}

    def _patterns(self) -> Tensor:
        """[labels, C, I, I]: coarse noise, enlarged."""
        world = torch.Generator().manual_seed(_WORLD)
        coarse = torch.randn(self.num_labels, self.num_channels, 4, 4, generator=world)
        size = (self.side, self.side)
        return torch.nn.functional.interpolate(coarse, size, mode="bilinear", align_corners=True)


@dataclass(frozen=True)
class Alignments:
    """Alignments of made-up proteins: rows are mutated copies of one sequence, of which some
    residues are hidden; two residues are the farther apart the farther along the chain they lie,
    and farther still when both are of the bulky half of the alphabet.
    """

    num_sequences: int
    num_residues: int
    num_bins: int
    source: str = "synthetic alignments: mutated copies of a sequence, distances from its residues"

    # Ids of the 20 amino acids come first; 22 hides a residue.
    _NUM_ACIDS = 20
    _HIDDEN = 22
    _MUTATED, _MASKED = 0.1, 0.15

    @property
    def digest(self) -> str:
        return f"alignments-{self.num_sequences}-{self.num_residues}-{self.num_bins}"

    def batch(self, step: int, *, batch: int, seed: int) -> dict[str, Tensor]:
        """Return ids_BSR (residues hidden), residues_BSR (all of them) and bins_BRR."""
        generator = _generator(seed, step)
        shape = (batch, self.num_sequences, self.num_residues)
        first = torch.randint(self._NUM_ACIDS, (batch, 1, self.num_residues), generator=generator)
        other = torch.randint(self._NUM_ACIDS, shape, generator=generator)
        mutated = torch.rand(shape, generator=generator) < self._MUTATED
        mutated[:, 0] = False
        residues = torch.where(mutated, other, first)
        masked = torch.rand(shape, generator=generator) < self._MASKED
        ids = residues.masked_fill(masked, self._HIDDEN)
        place = torch.arange(self.num_residues)
        along = (place[:, None] - place[None, :]).abs()
        bulky = (first[:, 0] >= self._NUM_ACIDS // 2).long()
        bins = 2 * along + bulky[:, :, None] + bulky[:, None, :]
        return {
            "ids_BSR": ids,
            "residues_BSR": residues,
            "bins_BRR": bins.clamp(max=self.num_bins - 1),
        }
