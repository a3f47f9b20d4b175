"""What is sent, and when: Poisson arrivals of given lengths, or a trace's."""

from __future__ import annotations

import csv
import datetime
import json
import pydoc_data.topics
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import FormatError, UsageError


@dataclass(frozen=True)
class Arrival:
    """A request to come: seconds after the start, and how long prompt and output are, in tokens."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Lengths:
    """Uniformly drawn lengths, both ends included.

    >>> Lengths.parse("50-300", "prompt")
    Lengths(low=50, high=300)
    """

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, what: str) -> Lengths:
        """Return lengths from "128" or "50-300". Raises UsageError."""
        low, _, high = text.partition("-")
        if not (low.isdigit() and (high or low).isdigit()) or not 1 <= int(low) <= int(high or low):
            raise UsageError(
                f"{text!r} is no length of a {what}", remedy="use tokens, e.g. 128 or 50-300"
            )
        return cls(int(low), int(high or low))


def poisson(
    rate: float, num: int, prompt: Lengths, output: Lengths, *, seed: int
) -> tuple[Arrival, ...]:
    """Return `num` arrivals at `rate` a second on average; rate inf sends all at once."""
    draw = random.Random(seed)
    at_s, arrivals = 0.0, []
    for _ in range(num):
        lengths = (draw.randint(prompt.low, prompt.high), draw.randint(output.low, output.high))
        arrivals.append(Arrival(at_s, *lengths))
        at_s += draw.expovariate(rate) if rate != float("inf") else 0.0
    return tuple(arrivals)


def trace(
    path: Path, *, num: int | None, speed: float, max_tokens: int | None
) -> tuple[Arrival, ...]:
    """Return the arrivals of a trace, `speed` times as fast, without those above `max_tokens`.

    JSON lines with `timestamp` (ms, Mooncake's) or `at_s`, `input_length` and `output_length`; or
    CSV with `TIMESTAMP`, `ContextTokens` and `GeneratedTokens` (Azure's). Raises FormatError.
    """
    try:
        rows = list(_csv_rows(path) if path.suffix == ".csv" else _json_rows(path))
    except (KeyError, ValueError, TypeError) as error:
        raise FormatError(f"{path} is no trace of requests: {error!r}") from error
    fitting = [row for row in rows if max_tokens is None or row[1] + row[2] <= max_tokens]
    if not fitting:
        raise UsageError(f"{path} has no request of at most {max_tokens} tokens")
    start_s = fitting[0][0]
    return tuple(
        Arrival((at_s - start_s) / speed, prompt, max(1, output))
        for at_s, prompt, output in fitting[:num]
    )


def _json_rows(path: Path) -> Iterator[tuple[float, int, int]]:
    for line in path.read_text("utf-8").splitlines():
        row: dict[str, Any] = json.loads(line)
        at_s = row["at_s"] if "at_s" in row else row["timestamp"] / 1000
        yield float(at_s), int(row["input_length"]), int(row["output_length"])


def _csv_rows(path: Path) -> Iterator[tuple[float, int, int]]:
    with path.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            # Azure writes a seventh decimal, which datetime does not read.
            at = datetime.datetime.fromisoformat(row["TIMESTAMP"][:26])
            yield at.timestamp(), int(row["ContextTokens"]), int(row["GeneratedTokens"])


class Texts:
    """Real English, cut to length: Python's own language reference, from a random place each."""

    def __init__(self, *, chars_per_token: float, shared_tokens: int = 0, seed: int = 0) -> None:
        """`shared_tokens`: how much of every prompt's beginning is the same for all."""
        self._text = "\n".join(pydoc_data.topics.topics.values())
        self._chars_per_token = chars_per_token
        self._shared = self._cut(0, shared_tokens)
        self._shared_tokens = shared_tokens
        self._draw = random.Random(seed)

    def prompts(self, arrivals: Sequence[Arrival]) -> list[str]:
        """Return a prompt of about the wanted length for each arrival."""
        made = []
        for arrival in arrivals:
            start = self._draw.randrange(len(self._text))
            own = max(1, arrival.prompt_tokens - self._shared_tokens)
            made.append(self._shared + self._cut(start, own))
        return made

    def _cut(self, start: int, num_tokens: int) -> str:
        length = round(num_tokens * self._chars_per_token)
        text = self._text[start : start + length]
        while len(text) < length:
            text += self._text[: length - len(text)]
        return text
