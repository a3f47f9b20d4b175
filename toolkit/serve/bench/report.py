"""What a load found out: percentiles, rates, and how many requests kept their promise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import require
from toolkit.serve.bench.sample import Sample

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Promise:
    """A service level objective: both hold for a request, or it does not count as good."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def keeps(self, sample: Sample) -> bool:
        """Return whether the request was served within the objective."""
        if sample.error is not None:
            return False
        tpot_s = sample.tpot_s
        return (self.ttft_s is None or sample.ttft_s <= self.ttft_s) and (
            self.tpot_s is None or tpot_s is None or tpot_s <= self.tpot_s
        )


def summary(samples: Sequence[Sample], promise: Promise) -> dict[str, Any]:
    """Return one run's figures; failures count, in rates as in goodput."""
    served = [sample for sample in samples if sample.error is None]
    duration_s = max((sample.end_s for sample in samples), default=0.0)
    good = sum(map(promise.keeps, samples))
    tpots = [sample.tpot_s for sample in served if sample.tpot_s is not None]
    return {
        "source": "measured",
        "num_requests": len(samples),
        "num_served": len(served),
        "errors": dict(Counter(s.error for s in samples if s.error is not None)),
        "duration_s": duration_s,
        "requests_per_s": len(served) / duration_s if duration_s else 0.0,
        "output_tokens_per_s": _total(served, "output_tokens") / duration_s if duration_s else 0.0,
        "prompt_tokens_per_s": _total(served, "prompt_tokens") / duration_s if duration_s else 0.0,
        "prompt_tokens": _total(served, "prompt_tokens"),
        "output_tokens": _total(served, "output_tokens"),
        "ttft_s": spread([sample.ttft_s for sample in served]),
        "tbt_s": spread([gap for sample in served for gap in sample.gaps_s]),
        "tpot_s": spread(tpots),
        "e2e_s": spread([sample.e2e_s for sample in served]),
        "num_good": good,
        "goodput_per_s": good / duration_s if duration_s else 0.0,
        "slo": {"ttft_s": promise.ttft_s, "tpot_s": promise.tpot_s},
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile, between the two nearest values in proportion.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 50)
    2.5
    """
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def draw(runs: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Write latency against load as a picture: `runs` are summaries with their `rate`."""
    pyplot = require("matplotlib.figure", extra="plots")
    figure = pyplot.Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    runs = [run for run in runs if run["rate"] is not None]
    rates = [run["rate"] for run in runs]
    for panel, key, text in (
        (panels[0], "ttft_s", "time to first token"),
        (panels[1], "tbt_s", "time between tokens"),
    ):
        for name, style in (("p50", "o-"), ("p95", "s--"), ("p99", "^:")):
            panel.plot(rates, [(run[key] or {}).get(name) for run in runs], style, label=name)
        panel.set(xlabel="requests sent a second", ylabel=f"{text} [s]", yscale="log")
        panel.legend()
    panels[2].plot(rates, [run["requests_per_s"] for run in runs], "o-", label="served")
    panels[2].plot(rates, [run["goodput_per_s"] for run in runs], "s--", label="within the SLO")
    panels[2].axline((0, 0), slope=1, color="grey", linewidth=0.8, linestyle=":")
    panels[2].set(xlabel="requests sent a second", ylabel="requests a second")
    panels[2].legend()
    figure.suptitle(f"{title} (measured)")
    figure.savefig(path, dpi=130)


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Return mean and percentiles, or None of nothing."""
    if not values:
        return None
    # Sorted once; what is sorted already is sorted again in no time.
    values = sorted(values)
    found = {f"p{percent}": percentile(values, percent) for percent in PERCENTILES}
    return {"mean": sum(values) / len(values)} | found


def _total(samples: Sequence[Sample], field: str) -> int:
    return sum(getattr(sample, field) for sample in samples)
