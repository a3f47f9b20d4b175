"""The loads that contenders are compared under: when requests come, and how long they are."""

from __future__ import annotations

import pydoc_data.topics
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.serve.bench.client import Sample
from toolkit.serve.bench.load import Arrival, Lengths, poisson
from toolkit.serve.bench.report import Promise, summary

_CHAT = Lengths(50, 300), Lengths(50, 150)


@dataclass(frozen=True)
class Case:
    """One load and the figure it is run for; `runs` in a row make one measurement."""

    name: str
    about: str
    arrivals: Callable[[int], tuple[Arrival, ...]]  # from a seed
    figure: str  # of `measured`
    unit: str
    runs: int = 1


def at_once(count: int, prompt: int, output: int) -> tuple[Arrival, ...]:
    """Return `count` equal requests, all sent at the start."""
    return (Arrival(0.0, prompt, output),) * count


def long_mix(rate: float, count: int, seed: int) -> tuple[Arrival, ...]:
    """Half long prompts with short outputs, half the reverse, at random."""
    draw = random.Random(seed)
    times = poisson(rate, count, Lengths(1, 1), Lengths(1, 1), seed=seed)
    shapes = (((800, 1500), (20, 50)), ((30, 100), (100, 200)))
    made = []
    for each in times:
        prompt, output = draw.choice(shapes)
        made.append(Arrival(each.at_s, draw.randint(*prompt), draw.randint(*output)))
    return tuple(made)


def _mix(rate: float) -> Case:
    return Case(
        f"mix-{rate:g}",
        f"40 requests of the long-and-short mix, {rate:g} a second",
        lambda seed: long_mix(rate, 40, seed),
        "output_tokens_per_s",
        "tok/s",
    )


CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case(
            "single",
            "one request: 64 in, 128 out",
            lambda seed: at_once(1, 64, 128),
            "decode_tokens_per_s",
            "tok/s",
            runs=2,
        ),
        Case(
            "prefill",
            "one request: 1,024 in, 1 out",
            lambda seed: at_once(1, 1024, 1),
            "prefill_tokens_per_s",
            "tok/s",
            runs=3,
        ),
        Case(
            "batch",
            "32 requests at once: 128 in, 128 out",
            lambda seed: at_once(32, 128, 128),
            "output_tokens_per_s",
            "tok/s",
        ),
        Case(
            "chat",
            "40 requests, 4 a second: 50-300 in, 50-150 out",
            lambda seed: poisson(4.0, 40, *_CHAT, seed=seed),
            "output_tokens_per_s",
            "tok/s",
        ),
        Case(
            "chat-8",
            "80 requests, 8 a second: 50-300 in, 50-150 out",
            lambda seed: poisson(8.0, 80, *_CHAT, seed=seed),
            "output_tokens_per_s",
            "tok/s",
        ),
        Case(
            "calm",
            "24 requests, 0.7 a second: 50-300 in, 50-150 out",
            lambda seed: poisson(0.7, 24, *_CHAT, seed=seed),
            "ttft_p95_s",
            "s",
        ),
        Case(
            "mix",
            "30 requests, 2 a second: half 800-1,500 in and 20-50 out, half 30-100 and 100-200",
            lambda seed: long_mix(2.0, 30, seed),
            "output_tokens_per_s",
            "tok/s",
        ),
        # The mix below what two cores can bear, and at it.
        *(_mix(rate) for rate in (0.25, 0.6, 0.8, 1.0, 1.2)),
    )
}


class Passages:
    """Prompts of an exact number of tokens: the Python language's own help, from random places."""

    def __init__(self, encode: Callable[[str], Sequence[int]]) -> None:
        topics = pydoc_data.topics.topics
        self._ids = list(encode("\n".join(topics[name] for name in sorted(topics))))

    def prompts(self, arrivals: Sequence[Arrival], seed: int) -> list[list[int]]:
        """Return token ids for each arrival; another seed gives other places."""
        draw = random.Random(seed)
        made = []
        for arrival in arrivals:
            start = draw.randrange(len(self._ids) - arrival.prompt_tokens)
            made.append(self._ids[start : start + arrival.prompt_tokens])
        return made


def measured(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return one run's figures: the report's, and those of a request alone.

    Rates over a whole run count what was served only; a request that failed or came short of its
    length is in `num_failed`.
    """
    found = summary(samples, Promise())
    served = [sample for sample in samples if sample.error is None]
    paces = [1 / sample.tpot_s for sample in served if sample.tpot_s]
    speeds = [sample.prompt_tokens / sample.ttft_s for sample in served]
    short = sum(sample.output_tokens != sample.arrival.output_tokens for sample in served)
    own = {
        "num_failed": len(samples) - len(served) + short,
        "decode_tokens_per_s": statistics.median(paces) if paces else None,
        "prefill_tokens_per_s": statistics.median(speeds) if speeds else None,
        "ttft_p50_s": (found["ttft_s"] or {}).get("p50"),
        "ttft_p95_s": (found["ttft_s"] or {}).get("p95"),
        "tbt_p50_s": (found["tbt_s"] or {}).get("p50"),
        "tbt_p99_s": (found["tbt_s"] or {}).get("p99"),
    }
    return found | own
