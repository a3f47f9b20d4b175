"""Prices of many decode steps in a row, at once: the cost model's own numbers, step by step.

While the same requests decode, one step differs from the one before in its context alone, which
grows by a token each. So a whole run is priced with a few array operations. They are done in the
order in which `CostModel` does them for a single step, and give the same numbers to the last bit;
a simulator that takes many steps at once may then be held against one that takes each by itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from toolkit.serve.request import Phase
from toolkit.serve.split.cost_model import CostModel, Usage

# Sequences that a table of prices is made for at first.
_LEAST = 64
Array = NDArray[np.floating[Any]]


class Counts(NamedTuple):
    """How many sequences decode at each step of a run, and how many keys they attend to in all."""

    sequences: NDArray[np.int64]
    contexts: Array

    @property
    def num(self) -> int:
        """Steps."""
        return len(self.sequences)


class Run(NamedTuple):
    """What each step of a run takes alone; the fields are those of `Usage`, step by step."""

    attention_s: Array
    attention_bytes: Array
    dense_s: Array
    dense_bytes: Array
    overhead_s: Array

    @property
    def seconds(self) -> Array:
        """Each step's seconds with nothing beside it."""
        return self.attention_s + self.dense_s + self.overhead_s


class Runs:
    """Prices runs of decoding by one cost model, in which nothing may change afterwards."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self._tables: dict[float, _Table] = {}

    def decoding(self, counts: Counts, share: float) -> Run:
        """Return steps on `share` that decode one token each of so many sequences."""
        table, most = self._tables.get(share), int(counts.sequences[0])
        if table is None or table.most < most:
            most = max(most, 2 * table.most if table else _LEAST)
            table = self._tables[share] = _Table(self.cost, share, most)
        return table.run(counts)


class _Table:
    """Prices of decode steps by the number of sequences; what depends on context is added."""

    def __init__(self, cost: CostModel, share: float, most: int) -> None:
        self.most = most
        prices, n = cost.prices(Phase.DECODE, share), np.arange(most + 1)
        self.attention = [
            (_fixed(compute, n), _fixed(memory, n))
            for is_attention, compute, memory in prices.kernels
            if is_attention
        ]
        self.dense = [
            (_fixed(compute, n), _fixed(memory, n))
            for is_attention, compute, memory in prices.kernels
            if not is_attention
        ]
        self.attention_bytes = _fixed(prices.attention_bytes.terms, n)
        self.dense_bytes = _fixed(prices.dense_bytes.terms, n)
        overhead_s: Array = cost.overhead.per_step_s + n * cost.overhead.per_sequence_s
        self.overhead_s: Array = overhead_s + prices.launches_s
        if cost.exchange is not None:
            tokens_s = [cost.exchange.seconds_of(num) for num in range(most + 1)]
            self.overhead_s = self.overhead_s + np.array(tokens_s)
        # Where no dense kernel looks at the context, all of them are one column.
        self.dense_s: Array | None = None
        if not any(form.rises for pair in self.dense for form in pair):
            self.dense_s = self._seconds(self.dense, n, np.zeros(most + 1))

    def run(self, counts: Counts) -> Run:
        """Return what steps of so many sequences take."""
        n, contexts = counts
        known = self.dense_s
        return Run(
            self._seconds(self.attention, n, contexts),
            self.attention_bytes.at(n, contexts),
            self._seconds(self.dense, n, contexts) if known is None else known[n],
            self.dense_bytes.at(n, contexts),
            self.overhead_s[n],
        )

    @staticmethod
    def _seconds(
        kernels: list[tuple[_Form, _Form]], n: NDArray[np.int64], contexts: Array
    ) -> Array:
        found: Array = np.zeros(len(n))
        for compute, memory in kernels:
            found = found + np.maximum(compute.at(n, contexts), memory.at(n, contexts))
        return found


class _Form(NamedTuple):
    """A sum of terms in the order of PerCount's fields, whose first three depend on n alone."""

    head: Array
    per_context: float
    per_pair: float
    tail: Array | None

    @property
    def rises(self) -> bool:
        """Whether it depends on the context."""
        return bool(self.per_context or self.per_pair)

    def at(self, n: NDArray[np.int64], contexts: Array) -> Array:
        # Each token attends to its whole context: there are as many pairs as keys. What is zero is
        # left out: adding it would change nothing.
        found = self.head[n]
        if self.per_context:
            found = found + self.per_context * contexts
        if self.per_pair:
            found = found + self.per_pair * contexts
        return found if self.tail is None else found + self.tail[n]


def _fixed(terms: tuple[float, ...], n: NDArray[np.int64]) -> _Form:
    constant, per_n, per_token, per_context, per_pair, per_sample = terms
    head: Array = constant + per_n * n + per_token * n
    tail: Array | None = per_sample * n if per_sample else None
    return _Form(head, per_context, per_pair, tail)


def beside(own: Run, other: Usage, bandwidth: float) -> Array:
    """Return each step's seconds beside steps like `other`, as `CostModel.beside`."""
    total_s = other.seconds
    if not total_s:
        return own.seconds
    idle = other.overhead_s / total_s
    (part, rate), (dense_part, dense_rate) = (
        (segment.seconds / total_s, segment.rate) for segment in (other.attention, other.dense)
    )
    found = own.overhead_s
    for seconds, moved in (
        (own.attention_s, own.attention_bytes),
        (own.dense_s, own.dense_bytes),
    ):
        mine = moved / seconds
        kept = part / np.maximum(1.0, (mine + rate) / bandwidth)
        kept += dense_part / np.maximum(1.0, (mine + dense_rate) / bandwidth)
        found = found + seconds / (idle + kept)
    return found


def slowed(own: Usage, other: Run, bandwidth: float) -> Array:
    """Return the seconds of `own` beside each step of `other`, as `CostModel.beside`."""
    total_s = other.seconds
    idle = other.overhead_s / total_s
    part, rate = other.attention_s / total_s, other.attention_bytes / other.attention_s
    dense_part, dense_rate = other.dense_s / total_s, other.dense_bytes / other.dense_s
    found: Array = np.full(len(total_s), own.overhead_s)
    for segment in (own.attention, own.dense):
        if segment.seconds:
            mine = segment.rate
            kept = part / np.maximum(1.0, (mine + rate) / bandwidth)
            kept += dense_part / np.maximum(1.0, (mine + dense_rate) / bandwidth)
            found = found + segment.seconds / (idle + kept)
    return found
