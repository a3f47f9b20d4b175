"""Memory ledger: what a device holds at its fullest moment, by category, and what binds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from toolkit.errors import InfeasibleError
from toolkit.units import format_bytes

Category = Literal[
    "parameters",
    "gradients",
    "optimizer",  # states and master weights
    "activations",  # saved for the backward pass, at their peak
    "temporary",  # workspaces and intermediate results, alive one at a time
    "communication",  # gathered shards and collective buffers
]
CATEGORIES: tuple[Category, ...] = get_args(Category)


@dataclass(frozen=True)
class Entry:
    """One thing that takes memory."""

    name: str
    category: Category
    num_bytes: float

    def __post_init__(self) -> None:
        if self.category not in CATEGORIES:
            raise ValueError(f"category {self.category!r} is none of {CATEGORIES}")
        if self.num_bytes < 0:
            raise ValueError(f"entry {self.name!r} has {self.num_bytes} bytes")


@dataclass(frozen=True)
class Ledger:
    """Entries that are alive at the fullest moment of one device.

    Temporaries are not alive together, so only the largest of them counts; all others add up.
    """

    entries: tuple[Entry, ...] = ()

    def add(self, name: str, category: Category, num_bytes: float) -> Ledger:
        """Return this ledger with one more entry.

        >>> Ledger().add("weights", "parameters", 8).add("grads", "gradients", 8).peak_bytes
        16
        """
        return Ledger((*self.entries, Entry(name, category, num_bytes)))

    def with_entries(self, entries: Iterable[Entry]) -> Ledger:
        """Return this ledger with more entries."""
        return Ledger((*self.entries, *entries))

    def category_bytes(self, category: Category) -> float:
        """Return what a category contributes to the peak."""
        sizes = [entry.num_bytes for entry in self.entries if entry.category == category]
        return max(sizes, default=0) if category == "temporary" else sum(sizes)

    @property
    def by_category(self) -> dict[Category, float]:
        """Bytes of every category, in the order of CATEGORIES."""
        return {category: self.category_bytes(category) for category in CATEGORIES}

    @property
    def peak_bytes(self) -> float:
        return sum(self.by_category.values())

    def fits(self, limit_bytes: float) -> bool:
        """Return whether the peak stays within `limit_bytes`."""
        return self.peak_bytes <= limit_bytes

    def binding(self) -> tuple[Category, Entry | None]:
        """Return the largest category and its largest entry: what to shrink first."""
        sizes = self.by_category
        category = max(sizes, key=lambda name: sizes[name])
        members = [entry for entry in self.entries if entry.category == category]
        return category, max(members, key=lambda entry: entry.num_bytes, default=None)

    def check(self, limit_bytes: float, *, where: str) -> None:
        """Raise InfeasibleError naming what binds when the peak exceeds `limit_bytes`."""
        if self.fits(limit_bytes):
            return
        category, entry = self.binding()
        share = self.category_bytes(category)
        largest = f", most of it {entry.name}" if entry and entry.name != category else ""
        raise InfeasibleError(
            f"{where} needs {format_bytes(self.peak_bytes)} and has {format_bytes(limit_bytes)}; "
            f"{category} take {format_bytes(share)}{largest}",
            remedy=_REMEDIES[category],
        )

    def rows(self) -> list[tuple[str, float, float]]:
        """Return (category, bytes, part of the peak) for each category that takes any."""
        peak = self.peak_bytes
        return [(name, size, size / peak) for name, size in self.by_category.items() if size]


_REMEDIES: dict[Category, str] = {
    "parameters": "split the model further: tensor parallel, pipeline stages or sharded parameters",
    "gradients": "shard the gradients over the data-parallel ranks",
    "optimizer": "shard the optimizer's states over the data-parallel ranks, or offload them",
    "activations": "recompute activations, or use smaller micro-batches",
    "temporary": "use smaller micro-batches, or split the largest operator",
    "communication": "gather smaller units, or prefetch fewer of them",
}


def adam_bytes(
    num_parameters: float, *, parameter_bytes: int = 4, master_weights: bool | None = None
) -> float:
    """Return the bytes of Adam's or AdamW's states for `num_parameters`.

    Two float32 moments, 8 bytes a parameter; with 16-bit parameters usually also a float32 master
    copy, 4 more, which makes the K = 12 of ZeRO (arXiv 1910.02054, section 3.1).
    `master_weights` None means: when `parameter_bytes` < 4. PyTorch's own AdamW keeps its moments
    in the parameters' type and no master copy; then say so with the sizes at hand.

    >>> adam_bytes(10), adam_bytes(10, parameter_bytes=2)
    (80, 120)
    """
    keeps_master = parameter_bytes < 4 if master_weights is None else master_weights
    return num_parameters * (8 + (4 if keeps_master else 0))
