"""What the items of the chain take on one class of devices, as arrays that ranges are summed of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from toolkit.ir.graph import Tensor
from toolkit.plan.search.choice import Cost


@dataclass(frozen=True)
class Rows:
    """One entry per item, seconds and bytes of one microbatch on one rank.

    `tied` names parameters that several items read; `held` counts all others.
    """

    forward: Any
    backward: Any
    weight: Any
    again: Any
    sync: Any
    saved: Any
    entering: Any
    temporary: Any
    owed: Any
    held: Any
    tied: tuple[Mapping[str, int], ...]
    parts: tuple[tuple[Tensor, ...], ...]
    is_block: Any
    earlier: Any  # of forward, in passes before the last

    @staticmethod
    def of(costs: Sequence[Cost], is_block: Sequence[bool], shared: Sequence[str]) -> Rows:
        def array(name: str) -> Any:
            return np.array([getattr(cost, name) for cost in costs], dtype=float)

        common = set(shared)
        tied = tuple(
            {name: part.num_bytes for name, part in cost.parameters.items() if name in common}
            for cost in costs
        )
        own = {id(cost): tuple(cost.parameters.values()) for cost in costs}
        held = [
            sum(part.num_bytes for name, part in cost.parameters.items() if name not in common)
            for cost in costs
        ]
        return Rows(
            array("forward_s"), array("backward_s"), array("weight_s"), array("again_s"),
            array("sync_s"), array("saved_bytes"), array("entering_bytes"),
            array("temporary_bytes"), array("owed_bytes"), np.array(held, dtype=float), tied,
            tuple(own[id(cost)] for cost in costs), np.array(is_block), array("earlier_s"),
        )  # fmt: skip

    @property
    def num_items(self) -> int:
        return len(self.forward)

    @property
    def works(self) -> tuple[float, float, float]:
        """Seconds of one microbatch: forward, backward, and of that for gradients of weights."""
        return float(self.forward.sum()), float(self.backward.sum()), float(self.weight.sum())

    @cached_property
    def gain(self) -> Any:
        """What recomputing an item frees of each microbatch alive; nothing outside the blocks."""
        return np.where(self.is_block, np.maximum(self.saved - self.entering, 0.0), 0.0)

    @cached_property
    def gains(self) -> Any:
        return prefix(self.gain)

    @cached_property
    def agains(self) -> Any:
        return prefix(np.where(self.gain > 0, self.again, 0.0))

    @cached_property
    def seconds(self) -> Any:
        """Forward and backward of the items [i, j)."""
        return between(self.forward + self.backward)

    @cached_property
    def saveds(self) -> Any:
        return between(self.saved)

    @cached_property
    def parameters(self) -> Any:
        """Bytes of parameters of the items [i, j); tied ones once a range."""
        table = between(self.held)
        names = {name: size for tied in self.tied for name, size in tied.items()}
        begins, ends = np.indices(table.shape)
        for name, size in names.items():
            places = [place for place, tied in enumerate(self.tied) if name in tied]
            inside = np.zeros(table.shape, dtype=bool)
            for place in places:
                inside |= (begins <= place) & (place < ends)
            table = table + np.where(inside, size, 0)
        return table

    @cached_property
    def oweds(self) -> Any:
        return between(self.owed)

    @cached_property
    def temporaries(self) -> Any:
        """What the items [i, j) take beyond what they save, where that is most: when backward
        reaches an item, what the later ones saved is free again.
        """
        size = self.num_items + 1
        after = prefix(self.saved)
        table = np.zeros((size, size))
        for begin in range(self.num_items):
            most = np.maximum.accumulate(self.temporary[begin:] + after[begin + 1 :])
            table[begin, begin + 1 :] = np.maximum(most - after[begin + 1 :], 0.0)
        return table

    def again_range(self, begins: Any, frees: Any) -> Any:
        """Return up to which item, from `begins` on, recomputing frees at least `frees` of each
        microbatch alive.
        """
        wanted = self.gains[begins] + np.maximum(frees, 0.0)
        return np.where(
            frees > 0, np.searchsorted(self.gains, wanted * (1 - 1e-12), side="left"), begins
        )


def prefix(values: Any) -> Any:
    return np.concatenate([[0.0], np.cumsum(values)])


def between(values: Any) -> Any:
    """Return the sum of values[i:j] at [i, j]; infinity where j <= i."""
    sums = prefix(values)
    table = sums[None, :] - sums[:, None]
    return np.where(np.tri(len(sums), len(sums), 0, dtype=bool), np.inf, table)
