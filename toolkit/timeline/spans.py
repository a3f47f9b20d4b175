"""Spans on tracks: what ran where, and when, predicted and measured side by side."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Source = Literal["predicted", "measured", "simulated"]
SOURCES: tuple[Source, ...] = ("predicted", "measured", "simulated")


@dataclass(frozen=True)
class Span:
    """One thing that ran: [start_s, end_s) in seconds on a track such as "rank 0" or "prefetch".

    `group` colours it (forward, backward, send, prefill, decode, read, ...); `source` says whether
    it was predicted, measured or simulated; `detail` holds whatever else a reader may ask for.
    """

    name: str
    track: str
    start_s: float
    end_s: float
    source: Source = "measured"
    group: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start_s) and math.isfinite(self.end_s)):
            raise ValueError(
                f"span {self.name!r} on {self.track!r} runs from {self.start_s} to {self.end_s} s; "
                "times must be finite"
            )
        if self.end_s < self.start_s:
            raise ValueError(
                f"span {self.name!r} on {self.track!r} ends at {self.end_s} s, before its start at "
                f"{self.start_s} s"
            )
        if self.source not in SOURCES:
            raise ValueError(f"span {self.name!r}: source {self.source!r} is none of {SOURCES}")

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Counter:
    """A quantity over time, such as bytes in use: each (time_s, value) holds until the next."""

    name: str
    samples: tuple[tuple[float, float], ...]
    source: Source = "measured"
    unit: str = ""

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"counter {self.name!r}: source {self.source!r} is none of {SOURCES}")
        if not all(math.isfinite(number) for sample in self.samples for number in sample):
            raise ValueError(f"counter {self.name!r}: times and values must be finite")
        times = [time_s for time_s, _ in self.samples]
        if times != sorted(times):
            raise ValueError(f"counter {self.name!r}: samples must be in order of time")


@dataclass(frozen=True)
class Timeline:
    """Spans (and counters) and what they show. Tracks keep the order in which they first appear."""

    title: str
    spans: tuple[Span, ...] = ()
    counters: tuple[Counter, ...] = ()

    @property
    def start_s(self) -> float:
        return min(self._times("start_s", 0), default=0.0)

    @property
    def end_s(self) -> float:
        return max(self._times("end_s", -1), default=0.0)

    def _times(self, edge: str, sample: int) -> list[float]:
        times: list[float] = [getattr(span, edge) for span in self.spans]
        return times + [c.samples[sample][0] for c in self.counters if c.samples]

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def tracks(self) -> tuple[tuple[str, Source], ...]:
        """(track, source) pairs; a track's predicted and measured halves lie next to each other."""
        order: dict[str, None] = {}
        seen: set[tuple[str, Source]] = set()
        for span in self.spans:
            order.setdefault(span.track)
            seen.add((span.track, span.source))
        return tuple(
            (track, source) for track in order for source in SOURCES if (track, source) in seen
        )

    def on(self, track: str, source: Source) -> tuple[Span, ...]:
        """Return the spans of one track half, by start time."""
        return self.halves().get((track, source), ())

    def halves(self) -> dict[tuple[str, Source], tuple[Span, ...]]:
        """Return every track half with its spans by start time, in the order of `tracks`."""
        found: dict[tuple[str, Source], list[Span]] = {half: [] for half in self.tracks}
        for span in self.spans:
            found[span.track, span.source].append(span)
        return {half: tuple(sorted(spans, key=_by_time)) for half, spans in found.items()}

    def paired_counters(self) -> tuple[Counter, ...]:
        """Return the counters, those of one name next to each other as track halves are."""
        names = list(dict.fromkeys(counter.name for counter in self.counters))
        order = {name: at for at, name in enumerate(names)}
        return tuple(sorted(self.counters, key=lambda c: (order[c.name], SOURCES.index(c.source))))

    def extent_s(self, source: Source) -> tuple[float, float] | None:
        """Return when the first span of `source` starts and its last ends; None without any."""
        spans = [span for span in self.spans if span.source == source]
        if not spans:
            return None
        return min(span.start_s for span in spans), max(span.end_s for span in spans)

    def aligned(self, *, title: str | None = None) -> Timeline:
        """Return the timeline with each source starting at 0, so that halves can be compared.

        A plan counts from zero and a run from whatever its clock said; this puts them on one axis.
        """
        zero = {source: (self.extent_s(source) or (0.0, 0.0))[0] for source in SOURCES}
        return Timeline(
            title or self.title,
            spans=tuple(
                replace(s, start_s=s.start_s - zero[s.source], end_s=s.end_s - zero[s.source])
                for s in self.spans
            ),
            counters=tuple(
                replace(c, samples=tuple((at - zero[c.source], value) for at, value in c.samples))
                for c in self.counters
            ),
        )

    def merged(self, other: Timeline, *, title: str | None = None) -> Timeline:
        """Return both timelines' spans on one page, each keeping its own source."""
        return Timeline(
            title or self.title, self.spans + other.spans, self.counters + other.counters
        )


def _by_time(span: Span) -> tuple[float, float]:
    return span.start_s, span.end_s


def plain(value: Any) -> Any:
    """Return `value` as JSON holds it; what JSON has no word for (NaN, a dtype) becomes text.

    >>> plain({"shape": (2, 3), "loss": float("nan"), 4: None})
    {'shape': [2, 3], 'loss': 'nan', '4': None}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def pack(spans: Iterable[Span]) -> tuple[tuple[Span, int], ...]:
    """Give each span the lowest slot (row within its track) that is free when it starts.

    >>> a, b, c = Span("a", "t", 0, 2), Span("b", "t", 1, 3), Span("c", "t", 2, 4)
    >>> [(span.name, slot) for span, slot in pack([a, b, c])]
    [('a', 0), ('b', 1), ('c', 0)]
    """
    free: list[int] = []
    busy: list[tuple[float, int]] = []
    num_slots = 0
    placed: list[tuple[Span, int]] = []
    for span in sorted(spans, key=_by_time):
        while busy and busy[0][0] <= span.start_s:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            slot = heapq.heappop(free)
        else:
            slot, num_slots = num_slots, num_slots + 1
        heapq.heappush(busy, (span.end_s, slot))
        placed.append((span, slot))
    return tuple(placed)
