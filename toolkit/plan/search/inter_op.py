"""Where the stages of a pipeline begin: dynamic programming over the chain's items.

    minimise  (m - 1) max_s t_s + sum_s t_s

the length of a schedule of m microbatches whose slowest stage never waits (GPipe, 1F1B). Stage s on
a device of class k takes `times(s, k)[i, j]` for the items [i, j), infinity where that does not fit
its memory or may not be. Devices of several classes may be put in any order: the state is how many
items are placed and how many devices of each class are used. Exact: for every bound on the slowest
stage the least sum is found (Alpa, arXiv 2201.12023, section 5), until no bound can do better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Bounds on the slowest stage that are tried; beyond it the best so far is taken.
_MOST_BOUNDS = 400


@dataclass(frozen=True)
class Cut:
    """Stage s holds the items from `begins[s]` up to the next, on a device of `classes[s]`."""

    begins: tuple[int, ...]
    classes: tuple[int, ...]
    slowest_s: float
    total_s: float

    def seconds(self, num_microbatches: int) -> float:
        return (num_microbatches - 1) * self.slowest_s + self.total_s

    def ends(self, num_items: int) -> tuple[int, ...]:
        return (*self.begins[1:], num_items)


def cut(
    times: Callable[[int, int], Any],
    num_items: int,
    num_devices: Sequence[int],
    num_microbatches: int,
) -> Cut | None:
    """Return the best cut into as many stages as devices (`num_devices` of each class), or None
    when no cut is feasible.

    >>> import numpy as np
    >>> costs = np.array([4, 1, 1, 1, 1])
    >>> whole = np.array([[costs[i:j].sum() if j > i else np.inf for j in range(6)]
    ...                   for i in range(6)])
    >>> cut(lambda stage, cls: whole, 5, [2], 8).begins
    (0, 1)
    """
    table = _Table(times, num_items, tuple(num_devices))
    least = table.best(math.inf)
    if least is None:
        return None
    best = least
    for tried, bound in enumerate(table.bounds(table.least_bound())):
        reachable = (num_microbatches - 1) * bound + least.total_s
        if reachable >= best.seconds(num_microbatches) * (1 - 1e-12) or tried >= _MOST_BOUNDS:
            break
        found = table.best(bound)
        if found is not None and found.seconds(num_microbatches) < best.seconds(num_microbatches):
            best = found
    return best


class _Table:
    def __init__(
        self, times: Callable[[int, int], Any], num_items: int, counts: tuple[int, ...]
    ) -> None:
        self.num_items = num_items
        self.counts = counts
        self.num_stages = sum(counts)
        self.times = {
            (stage, cls): np.asarray(times(stage, cls), dtype=float)
            for stage in range(self.num_stages)
            for cls in range(len(counts))
        }

    def bounds(self, least: float) -> list[float]:
        """Times that the slowest stage may take, from `least` on."""
        found = np.unique(np.concatenate([m[np.isfinite(m)] for m in self._distinct()]))
        return [float(value) for value in found if value >= least * (1 - 1e-12)]

    def _distinct(self) -> list[Any]:
        return list({id(matrix): matrix for matrix in self.times.values()}.values())

    def least_bound(self) -> float:
        """The shortest slowest stage of any cut."""
        reach = self._sweep(lambda reached, matrix: np.maximum(reached[:, None], matrix))
        return float(reach[-1][self.counts][0][self.num_items])

    def best(self, bound: float) -> Cut | None:
        """The cut of least total time whose stages take at most `bound` each."""
        limit = bound * (1 + 1e-12)

        def add(reached: Any, matrix: Any) -> Any:
            return reached[:, None] + np.where(matrix <= limit, matrix, np.inf)

        reach = self._sweep(add)
        total = float(reach[-1][self.counts][0][self.num_items])
        if not math.isfinite(total):
            return None
        begins, classes, used, end = [], [], self.counts, self.num_items
        slowest = 0.0
        for stage in reversed(range(self.num_stages)):
            _, begin_of, class_of = reach[stage + 1][used]
            begin, cls = int(begin_of[end]), int(class_of[end])
            slowest = max(slowest, float(self.times[stage, cls][begin, end]))
            begins.append(begin)
            classes.append(cls)
            used = tuple(count - (place == cls) for place, count in enumerate(used))
            end = begin
        return Cut(tuple(reversed(begins)), tuple(reversed(classes)), slowest, total)

    def _sweep(
        self, combine: Callable[[Any, Any], Any]
    ) -> list[dict[tuple[int, ...], tuple[Any, Any, Any]]]:
        """Stage after stage: (value, begin, class) of the last stage by devices used and items."""
        start = np.full(self.num_items + 1, np.inf)
        start[0] = 0.0
        nothing = np.zeros(self.num_items + 1, dtype=int)
        layers = [{tuple([0] * len(self.counts)): (start, nothing, nothing)}]
        for stage in range(self.num_stages):
            layer: dict[tuple[int, ...], tuple[Any, Any, Any]] = {}
            for used, (value, _begin, _cls) in layers[-1].items():
                for cls in range(len(self.counts)):
                    if used[cls] == self.counts[cls]:
                        continue
                    after = tuple(n + (place == cls) for place, n in enumerate(used))
                    every = combine(value, self.times[stage, cls])
                    begin = every.argmin(axis=0)
                    found = every[begin, np.arange(self.num_items + 1)]
                    if after not in layer:
                        layer[after] = (found, begin, np.full(self.num_items + 1, cls))
                    else:
                        old, old_begin, old_cls = layer[after]
                        better = found < old
                        layer[after] = (
                            np.where(better, found, old),
                            np.where(better, begin, old_begin),
                            np.where(better, cls, old_cls),
                        )
            layers.append(layer)
        return layers
