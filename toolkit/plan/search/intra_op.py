"""The inner search: one option for every node, so that nodes and edges together cost least while
the nodes' memory stays within a limit.

    minimise    sum_n seconds_n[x_n] + sum_e seconds_e[x_first, x_second]
    subject to  sum_n memory_n[x_n] <= limit

Without the limit this is exact by eliminating node after node (bucket elimination; the graphs of
layers are narrow). Where the limit binds, prices on memory give a solution and a bound on how far
from the best it is; if that is too far, an integer program decides (HiGHS), with the product of
two nodes' choices linearised per edge as in Alpa (Zheng et al., arXiv 2201.12023, section 4.2).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

# A table of more entries than this is left to the integer program.
_LARGEST_TABLE = 4_000_000
# Prices of memory that are tried; in practice a handful.
_MOST_PRICES = 60


@dataclass(frozen=True)
class Node:
    """Something to choose an option for; `seconds[k]` and `memory[k]` are those of option k."""

    name: str
    seconds: Any
    memory: Any


@dataclass(frozen=True)
class Edge:
    """What two nodes' options cost together: `seconds[k, l]` for k of `first`, l of `second`."""

    first: int
    second: int
    seconds: Any


@dataclass(frozen=True)
class Solution:
    """An option for each node. `bound_s` is a proven lower bound on the seconds of any solution."""

    options: tuple[int, ...]
    seconds: float
    memory: float
    bound_s: float
    method: str

    @property
    def gap(self) -> float:
        return (self.seconds - self.bound_s) / self.seconds if self.seconds else 0.0


# A table (its place in a list), the order of its dims, and its shape among those of a step.
_View = tuple[int, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class _Step:
    """A node to do without, the nodes its best option depends on, and the tables to add up."""

    node: int
    scope: tuple[int, ...]
    first: _View
    others: tuple[_View, ...]


@dataclass(frozen=True)
class Problem:
    """Nodes with options and the edges between them."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...] = field(default=())

    @cached_property
    def merged(self) -> tuple[list[Any], dict[tuple[int, int], Any]]:
        """Seconds by node and by pair of nodes, in ascending order; an edge from a node to itself
        belongs to the node.
        """
        alone = [np.asarray(node.seconds, dtype=float).copy() for node in self.nodes]
        pairs: dict[tuple[int, int], Any] = {}
        for edge in self.edges:
            matrix = np.asarray(edge.seconds, dtype=float)
            first, second = edge.first, edge.second
            if first == second:
                alone[first] += np.diagonal(matrix)
                continue
            if first > second:
                first, second, matrix = second, first, matrix.T
            pairs[first, second] = pairs.get((first, second), 0.0) + matrix
        return alone, pairs

    @cached_property
    def least_memory(self) -> float:
        return float(sum(np.min(node.memory) for node in self.nodes))

    def seconds_of(self, options: Sequence[int]) -> float:
        alone, pairs = self.merged
        total = sum(float(costs[k]) for costs, k in zip(alone, options, strict=True))
        return total + sum(float(m[options[i], options[j]]) for (i, j), m in pairs.items())

    def memory_of(self, options: Sequence[int]) -> float:
        return float(sum(n.memory[k] for n, k in zip(self.nodes, options, strict=True)))

    def solve(
        self,
        memory_limit: float = math.inf,
        *,
        time_limit_s: float = 5.0,
        gap: float = 1e-3,
    ) -> Solution | None:
        """Return a solution within `gap` of the best (0: the best), or None when none fits.

        When HiGHS runs out of time, the best solution so far is returned, with its bound.
        """
        if self.least_memory > memory_limit * (1 + 1e-12):
            return None
        free = self._eliminated(0.0)
        if free is None:
            return self._integer(memory_limit, time_limit_s, gap)
        if free.memory <= memory_limit:
            return free
        priced = self._priced(memory_limit)
        if priced.gap <= gap:
            return priced
        exact = self._integer(memory_limit, time_limit_s, gap)
        if exact is None or exact.seconds > priced.seconds:
            return priced
        return exact

    # Elimination ----------------------------------------------------------------------------

    def _eliminated(self, price: float) -> Solution | None:
        """The best for seconds + price x memory; None when a table would grow too large."""
        steps = self._steps
        if steps is None:
            return None
        alone, pairs = self.merged
        tables: list[Any] = [
            costs + price * memory if price else costs
            for costs, memory in zip(alone, self._memories, strict=True)
        ]
        tables += pairs.values()
        best: list[Any] = []
        for step in steps:
            total = tables[step.first[0]].transpose(step.first[1]).reshape(step.first[2])
            for place, order, shape in step.others:
                total = total + tables[place].transpose(order).reshape(shape)
            which = total.argmin(axis=-1)
            best.append(which)
            tables.append(total.min(axis=-1))
        chosen: dict[int, int] = {}
        for step, which in zip(reversed(steps), reversed(best), strict=True):
            chosen[step.node] = int(which[tuple(chosen[i] for i in step.scope)])
        options = tuple(chosen[i] for i in range(len(self.nodes)))
        seconds = self.seconds_of(options)
        return Solution(options, seconds, self.memory_of(options), seconds, "elimination")

    @cached_property
    def _memories(self) -> list[Any]:
        return [np.asarray(node.memory, dtype=float) for node in self.nodes]

    @cached_property
    def _steps(self) -> list[_Step] | None:
        """Node after node, the tables that are added up to do without it: places among the nodes'
        own costs, those of pairs, and what the steps before have made.
        """
        if self._order is None:
            return None
        scopes: dict[int, tuple[int, ...]] = {i: (i,) for i in range(len(self.nodes))}
        scopes |= {len(scopes) + i: pair for i, pair in enumerate(self.merged[1])}
        made = len(scopes)
        found = []
        for node in self._order:
            mine = [(place, names) for place, names in scopes.items() if node in names]
            for place, _ in mine:
                del scopes[place]
            scope = tuple(sorted({i for _, names in mine for i in names} - {node}))
            whole = (*scope, node)
            # The largest first: what is added to it does not make it larger.
            mine.sort(key=lambda one: -len(one[1]))
            views = [self._view(place, names, whole) for place, names in mine]
            found.append(_Step(node, scope, views[0], tuple(views[1:])))
            scopes[made] = scope
            made += 1
        return found

    def _view(self, place: int, names: tuple[int, ...], whole: tuple[int, ...]) -> _View:
        order = sorted(range(len(names)), key=lambda at: whole.index(names[at]))
        return place, tuple(order), tuple(self._sizes[i] if i in names else 1 for i in whole)

    @cached_property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(len(node.seconds) for node in self.nodes)

    @cached_property
    def _order(self) -> list[int] | None:
        """Nodes in the order of elimination: always the one whose table is smallest."""
        near: dict[int, set[int]] = {i: set() for i in range(len(self.nodes))}
        for i, j in self.merged[1]:
            near[i].add(j)
            near[j].add(i)

        def table(node: int) -> int:
            return math.prod(self._sizes[i] for i in near[node]) * self._sizes[node]

        waiting = [(table(node), node) for node in near]
        heapq.heapify(waiting)
        order = []
        while near:
            size, node = heapq.heappop(waiting)
            if node not in near or size != table(node):
                continue  # done, or its neighbours have changed since
            if size > _LARGEST_TABLE:
                return None
            others = near.pop(node)
            for i in others:
                near[i] |= others - {i}
                near[i].discard(node)
                heapq.heappush(waiting, (table(i), i))
            order.append(node)
        return order

    def _priced(self, limit: float) -> Solution:
        """Find the price of memory at which the relaxed value, a bound, is largest: where the lines
        of a solution that fits and of one that does not meet, nothing is below (Kelley 1960).
        """
        over = self._eliminated(0.0)
        assert over is not None
        leanest = tuple(int(np.argmin(memory)) for memory in self._memories)
        bound = over.seconds
        best = Solution(
            leanest, self.seconds_of(leanest), self.memory_of(leanest), bound, "leanest"
        )
        method = "leanest"
        for _ in range(_MOST_PRICES):
            if over.memory <= best.memory:
                break
            price = (best.seconds - over.seconds) / (over.memory - best.memory)
            if not price > 0:
                break
            found = self._eliminated(price)
            assert found is not None
            value = found.seconds + price * (found.memory - limit)
            bound = max(bound, value)
            met = best.seconds + price * (best.memory - limit)
            if value >= met - 1e-12 * abs(met):
                break
            if found.memory <= limit:
                best, method = found, "priced memory"
            else:
                over = found
        return Solution(best.options, best.seconds, best.memory, bound, method)

    # The integer program --------------------------------------------------------------------

    def _integer(self, limit: float, time_limit_s: float, gap: float) -> Solution | None:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_matrix

        alone, pairs = self.merged
        sizes = self._sizes
        begins = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        num_choices = int(begins[-1])
        objective = [np.concatenate(alone)]
        rows: list[Any] = []
        columns: list[Any] = []
        values: list[Any] = []
        right: list[float] = []
        for i, size in enumerate(sizes):
            rows.append(np.full(size, len(right)))
            columns.append(begins[i] + np.arange(size))
            values.append(np.ones(size))
            right.append(1.0)
        at = num_choices
        for (i, j), matrix in pairs.items():
            objective.append(matrix.ravel())
            places = at + np.arange(matrix.size).reshape(matrix.shape)
            # Summed over the other end, an edge's row is the node's own choice.
            for k in range(sizes[i]):
                rows.append(np.full(sizes[j] + 1, len(right)))
                columns.append(np.append(places[k], begins[i] + k))
                values.append(np.append(np.ones(sizes[j]), -1.0))
                right.append(0.0)
            for k in range(sizes[j]):
                rows.append(np.full(sizes[i] + 1, len(right)))
                columns.append(np.append(places[:, k], begins[j] + k))
                values.append(np.append(np.ones(sizes[i]), -1.0))
                right.append(0.0)
            at += matrix.size
        low = list(right)
        if math.isfinite(limit):
            memory = np.concatenate([np.asarray(node.memory, dtype=float) for node in self.nodes])
            scale = max(limit, 1.0)
            rows.append(np.full(num_choices, len(right)))
            columns.append(np.arange(num_choices))
            values.append(memory / scale)
            low.append(-np.inf)
            right.append(limit / scale)
        costs = np.concatenate(objective)
        largest = max(float(np.abs(costs).max(initial=0.0)), 1e-30)
        matrix = coo_matrix(
            (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))),
            shape=(len(right), at),
        ).tocsr()
        found = milp(
            costs / largest,
            constraints=LinearConstraint(matrix, low, right),
            integrality=np.concatenate([np.ones(num_choices), np.zeros(at - num_choices)]),
            bounds=Bounds(0, 1),
            options={"time_limit": time_limit_s, "mip_rel_gap": gap},
        )
        if found.x is None:
            return None
        options = tuple(
            int(np.argmax(found.x[begins[i] : begins[i + 1]])) for i in range(len(sizes))
        )
        seconds = self.seconds_of(options)
        bound = getattr(found, "mip_dual_bound", None)
        return Solution(
            options,
            seconds,
            self.memory_of(options),
            min(seconds, bound * largest) if bound is not None else -math.inf,
            "HiGHS",
        )
