"""Spans on tracks: what ran where, and when, predicted and measured side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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
class Timeline:
    """Spans and what they show. Tracks keep the order in which they first appear."""

    title: str
    spans: tuple[Span, ...] = ()

    @property
    def start_s(self) -> float:
        return min((span.start_s for span in self.spans), default=0.0)

    @property
    def end_s(self) -> float:
        return max((span.end_s for span in self.spans), default=0.0)

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
        found = [span for span in self.spans if span.track == track and span.source == source]
        return tuple(sorted(found, key=lambda span: (span.start_s, span.end_s)))

    def merged(self, other: Timeline, *, title: str | None = None) -> Timeline:
        """Return both timelines' spans on one page, each keeping its own source."""
        return Timeline(title or self.title, self.spans + other.spans)


def pack(spans: Iterable[Span]) -> tuple[tuple[Span, int], ...]:
    """Give each span the lowest slot (row within its track) that is free when it starts.

    >>> a, b, c = Span("a", "t", 0, 2), Span("b", "t", 1, 3), Span("c", "t", 2, 4)
    >>> [(span.name, slot) for span, slot in pack([a, b, c])]
    [('a', 0), ('b', 1), ('c', 0)]
    """
    free_at: list[float] = []
    placed: list[tuple[Span, int]] = []
    for span in sorted(spans, key=lambda span: (span.start_s, span.end_s)):
        slot = next((i for i, end_s in enumerate(free_at) if end_s <= span.start_s), len(free_at))
        if slot == len(free_at):
            free_at.append(span.end_s)
        else:
            free_at[slot] = span.end_s
        placed.append((span, slot))
    return tuple(placed)
