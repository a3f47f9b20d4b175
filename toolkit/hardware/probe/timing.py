"""Repeat something within a time budget and keep every duration."""

from __future__ import annotations

import time
from collections.abc import Callable


def durations(
    action: Callable[[], object], *, budget_s: float, min_repeats: int = 3
) -> list[float]:
    """Run `action` once to warm up, then at least `min_repeats` times and until the budget ends.

    One slow action is never cut short; the repeats after it are, so that a part of the probe
    takes at most about `min_repeats + 1` actions or its budget, whichever is longer.
    """
    action()
    found: list[float] = []
    end = time.perf_counter() + budget_s
    while len(found) < min_repeats or time.perf_counter() < end:
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return found


def best_rate(amount: float, action: Callable[[], object], *, budget_s: float) -> float:
    """Return `amount` per second of the fastest repeat: what the machine can do undisturbed."""
    return amount / max(min(durations(action, budget_s=budget_s)), 1e-9)
