"""What is sent to a simulated engine: arrivals at a rate, with lengths like those of known
datasets.

Lengths are log-normal, cut at the 99th percentile; the parameters come from published medians and
95th percentiles (sigma = ln(P95 / P50) / 1.645) or from fits to published traces. Prompt and output
lengths are drawn independently: in the traces they are not correlated.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from toolkit.errors import FormatError, UsageError, unknown_name
from toolkit.serve.bench.load import Arrival

# Of the standard normal distribution.
_Z95, _Z99 = 1.645, 2.326


@dataclass(frozen=True)
class LogNormal:
    """Lengths in tokens whose logarithms are normal; none is longer than `most`."""

    median: float
    sigma: float
    most: int

    @classmethod
    def of_percentiles(cls, p50: float, p95: float, p99: float) -> LogNormal:
        """Return the distribution with that median and 95th percentile, cut at the 99th.

        >>> LogNormal.of_percentiles(432, 970, 1367).most
        1367
        """
        return cls(p50, math.log(p95 / p50) / _Z95, round(p99))

    @classmethod
    def fitted(cls, mu: float, sigma: float) -> LogNormal:
        """Return the distribution of a fit to logarithms, cut at its 99th percentile."""
        return cls(math.exp(mu), sigma, round(math.exp(mu + _Z99 * sigma)))

    def draw(self, source: random.Random) -> int:
        """Return one length, at least 1."""
        drawn = round(source.lognormvariate(math.log(self.median), self.sigma))
        return max(1, min(self.most, drawn))


class Lengths(Protocol):
    """Where a request's lengths come from."""

    def draw(self, source: random.Random) -> tuple[int, int]:
        """Return the tokens of a prompt and of its output, at least 1 each."""
        ...


@dataclass(frozen=True)
class Mixture:
    """Kinds of requests by how often they come: (weight, prompt lengths, output lengths)."""

    parts: tuple[tuple[float, LogNormal, LogNormal], ...]

    def draw(self, source: random.Random) -> tuple[int, int]:
        """Choose a kind by weight, then a prompt and an output of it."""
        weights = [weight for weight, _, _ in self.parts]
        _, prompt, output = source.choices(self.parts, weights)[0]
        return prompt.draw(source), output.draw(source)


# Columns of prompt and output tokens, as Vidur's and Azure's files name them.
_COLUMNS = (("num_prefill_tokens", "num_decode_tokens"), ("ContextTokens", "GeneratedTokens"))


@dataclass(frozen=True)
class Resampled:
    """Pairs of lengths drawn from a file, with replacement."""

    pairs: tuple[tuple[int, int], ...]

    @classmethod
    def read(cls, path: Path) -> Resampled:
        """Read a CSV with two columns of lengths. Raises FormatError where it has none."""
        try:
            with path.open(encoding="utf-8", newline="") as lines:
                rows = list(csv.DictReader(lines))
            prompt, output = next(pair for pair in _COLUMNS if rows and pair[0] in rows[0])
            pairs = tuple((int(row[prompt]), max(1, int(row[output]))) for row in rows)
            if min(pair[0] for pair in pairs) < 1:
                raise ValueError("a prompt of no tokens")
        except (StopIteration, ValueError, KeyError, TypeError, csv.Error) as error:
            known = " or ".join(", ".join(pair) for pair in _COLUMNS)
            raise FormatError(
                f"{path} is no table of lengths: {error!r}", remedy=f"it needs the columns {known}"
            ) from error
        return cls(pairs)

    def draw(self, source: random.Random) -> tuple[int, int]:
        """Return the lengths of one of the file's requests."""
        return source.choice(self.pairs)


@dataclass(frozen=True)
class Workload:
    """Lengths under a name, and where they are from."""

    name: str
    lengths: Lengths
    source: str

    def arrivals(self, rate: float, num: int, *, seed: int, cv: float = 1.0) -> tuple[Arrival, ...]:
        """Return `num` requests at `rate` a second on average; inf sends all at once.

        Gaps are Gamma-distributed with coefficient of variation `cv`: 1 is a Poisson process, more
        is burstier. Lengths depend on the seed alone and not on the rate, so that rates can be
        compared on the same requests.
        """
        if not rate > 0 or num < 1 or not cv > 0:
            raise UsageError(
                f"{num} requests at {rate} a second with a variation of {cv} are none",
                remedy="use a rate and a variation above 0, and 1 request or more",
            )
        lengths, gaps = random.Random(f"lengths {seed}"), random.Random(f"gaps {seed}")
        shape, at_s, made = 1.0 / cv**2, 0.0, []
        for _ in range(num):
            at_s += gaps.gammavariate(shape, 1.0 / shape) / rate
            made.append(Arrival(at_s, *self.lengths.draw(lengths)))
        return tuple(made)


_NEXUS = "arXiv 2507.06608 v5, table 1: medians, 95th and 99th percentiles"
_AZURE = "Azure LLM inference trace 2023 (CC-BY 4.0), log-normal fit"
_SHAREGPT = (
    LogNormal.of_percentiles(432, 970, 1367),
    LogNormal.of_percentiles(37, 383, 474),
)
_LONG = (
    LogNormal.of_percentiles(5461, 9292, 9817),
    LogNormal.of_percentiles(159, 339, 454),
)
_ARXIV = (
    LogNormal.of_percentiles(3575, 6460, 6894),
    LogNormal.of_percentiles(181, 357, 443),
)


def _one(prompt: LogNormal, output: LogNormal) -> Mixture:
    return Mixture(((1.0, prompt, output),))


WORKLOADS: Mapping[str, Workload] = {
    made.name: made
    for made in (
        Workload("sharegpt", _one(*_SHAREGPT), _NEXUS),
        Workload("long", _one(*_LONG), _NEXUS),
        Workload("arxiv", _one(*_ARXIV), _NEXUS),
        Workload("mixed", Mixture(((0.6, *_SHAREGPT), (0.4, *_LONG))), f"{_NEXUS}; 60 and 40 %"),
        Workload(
            "azure-code",
            _one(LogNormal.fitted(7.00, 1.36), LogNormal.fitted(2.79, 0.85)),
            _AZURE,
        ),
        Workload(
            "azure-conv",
            _one(LogNormal.fitted(6.63, 0.99), LogNormal.fitted(5.02, 0.86)),
            _AZURE,
        ),
    )
}


def find(name: str) -> Workload:
    """Return a workload by name; an unknown one is an error that names the nearest.

    A CSV file with two columns of lengths is one, too.
    """
    if name in WORKLOADS:
        return WORKLOADS[name]
    if name.endswith(".csv") and Path(name).is_file():
        return Workload(Path(name).name, Resampled.read(Path(name)), name)
    raise unknown_name("workload", name, WORKLOADS)
