"""Prices of many decode steps in a row, at once: the cost model's own numbers, step by step.

While the same requests decode, one step differs from the one before in its context alone, which
grows by a token each. So a whole run is priced with a few array operations. They are done in the
order in which `CostModel` does them for a single step, and give the same numbers to the last bit;
a simulator that takes many steps at once may then be held against one that takes each by itself.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from toolkit.serve.request import Phase
from toolkit.serve.split.cost_model import CostModel, Usage

# One number where it is the same at every step.
Values = float | NDArray[np.float64]


class Stretch(NamedTuple):
    """What each step of a run takes alone; the fields are those of `Usage`, step by step."""

    attention_s: Values
    attention_bytes: Values
    dense_s: Values
    dense_bytes: Values
    overhead_s: float

    @property
    def seconds(self) -> Values:
        """Each step's seconds with nothing beside it."""
        return self.attention_s + self.dense_s + self.overhead_s


def of(usage: Usage) -> Stretch:
    """Return a run of steps that all take the same."""
    attention, dense = usage.attention, usage.dense
    return Stretch(
        *(attention.seconds, attention.moved_bytes, dense.seconds, dense.moved_bytes),
        usage.overhead_s,
    )


def decoding(
    cost: CostModel, sequences: int, context: int, num: int, phase: Phase | None, share: float
) -> Stretch:
    """Return `num` steps that decode one token each of `sequences`.

    The first attends to `context` keys in all, each later one to `sequences` more.
    """
    prices = cost.prices(phase, share)
    contexts = context + sequences * np.arange(num, dtype=np.float64)
    n = sequences
    attention_s: Values = 0.0
    dense_s: Values = 0.0
    for is_attention, compute, memory in prices.kernels:
        seconds = [_linear(each, n, contexts) for each in (compute, memory)]
        most = _most(*seconds)
        if is_attention:
            attention_s = attention_s + most
        else:
            dense_s = dense_s + most
    overhead_s = cost.overhead.per_step_s + n * cost.overhead.per_sequence_s
    overhead_s += prices.launches_s
    if cost.exchange is not None:
        overhead_s += cost.exchange.seconds_of(n)
    moved = []
    for per in (prices.attention_bytes, prices.dense_bytes):
        moved.append(_linear(per.terms, n, contexts))
    return Stretch(attention_s, moved[0], dense_s, moved[1], overhead_s)


def beside(own: Stretch, other: Stretch, bandwidth: float) -> Values:
    """Return each step's seconds beside `other`, as `CostModel.beside`; either may be a run."""
    total_s = other.seconds
    idle = other.overhead_s / total_s
    traffic = [
        (seconds / total_s, _rate(seconds, moved))
        for seconds, moved in (
            (other.attention_s, other.attention_bytes),
            (other.dense_s, other.dense_bytes),
        )
    ]
    found: Values = own.overhead_s
    for seconds, moved in (
        (own.attention_s, own.attention_bytes),
        (own.dense_s, own.dense_bytes),
    ):
        if isinstance(seconds, float) and not seconds:
            continue
        rate = _rate(seconds, moved)
        one, two = (
            part / _most(1.0, (rate + other_rate) / bandwidth) for part, other_rate in traffic
        )
        found = found + seconds / (idle + (one + two))
    return found


def each(values: Values, num: int) -> list[float]:
    """Return one number a step."""
    return [values] * num if isinstance(values, float) else cast(list[float], values.tolist())


def _linear(terms: tuple[float, ...], n: int, contexts: NDArray[np.float64]) -> Values:
    """A sum of terms in the order of PerCount's fields, for a decode step of `n` sequences."""
    constant, per_n, per_token, per_context, per_pair, per_sample = terms
    found = constant + per_n * n + per_token * n
    if not per_context and not per_pair:
        return found + per_sample * n
    # Each token attends to its whole context: there are as many pairs as keys.
    return found + per_context * contexts + per_pair * contexts + per_sample * n


def _rate(seconds: Values, moved: Values) -> Values:
    if isinstance(seconds, float) and not seconds:
        return 0.0
    return moved / seconds


def _most(one: Values, two: Values) -> Values:
    if isinstance(one, float) and isinstance(two, float):
        return max(one, two)
    return cast(Values, np.maximum(one, two))
