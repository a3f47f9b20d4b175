"""What a timeline adds up to: busy time and utilisation of each track, sources compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from toolkit.timeline.spans import SOURCES, Source, Span, Timeline
from toolkit.units import format_seconds


@dataclass(frozen=True)
class TrackSummary:
    """One track half. `busy_s` counts overlapping spans once, `total_s` counts each in full.

    `utilisation` is busy time over the duration of everything of that source in the timeline.
    """

    track: str
    source: Source
    num_spans: int
    busy_s: float
    total_s: float
    utilisation: float


def tracks(timeline: Timeline) -> tuple[TrackSummary, ...]:
    """Return a summary of every track half, predicted and measured next to each other."""
    duration_s = durations_s(timeline)
    rows = []
    for (track, source), spans in timeline.halves().items():
        busy_s = busy(spans)
        rows.append(
            TrackSummary(
                track=track,
                source=source,
                num_spans=len(spans),
                busy_s=busy_s,
                total_s=sum(span.duration_s for span in spans),
                utilisation=busy_s / duration_s[source] if duration_s[source] else 0.0,
            )
        )
    return tuple(rows)


def busy(spans: Iterable[Span]) -> float:
    """Return the seconds during which at least one of `spans` runs.

    >>> busy([Span("a", "t", 0, 2), Span("b", "t", 1, 3), Span("c", "t", 5, 6)])
    4.0
    """
    busy_s, reached_s = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start_s):
        if span.end_s > reached_s:
            busy_s += span.end_s - max(span.start_s, reached_s)
            reached_s = span.end_s
    return busy_s


def durations_s(timeline: Timeline) -> dict[Source, float]:
    """Return how long each source that has spans takes from its first start to its last end."""
    extents = {source: timeline.extent_s(source) for source in SOURCES}
    return {source: found[1] - found[0] for source, found in extents.items() if found}


def against(timeline: Timeline) -> float | None:
    """Return measured duration over the predicted (else simulated) one; None without both.

    >>> against(Timeline("step", (Span("a", "t", 0, 2, "predicted"), Span("a", "t", 0, 3))))
    1.5
    """
    duration_s = durations_s(timeline)
    expected_s = duration_s.get("predicted", duration_s.get("simulated", 0.0))
    if "measured" not in duration_s or not expected_s:
        return None
    return duration_s["measured"] / expected_s


def ratios(rows: Iterable[TrackSummary]) -> dict[str, float]:
    """Return measured over predicted (else simulated) total time of each track that has both."""
    totals: dict[str, dict[Source, float]] = {}
    for row in rows:
        totals.setdefault(row.track, {})[row.source] = row.total_s
    found = {}
    for track, total in totals.items():
        expected_s = total.get("predicted", total.get("simulated", 0.0))
        if "measured" in total and expected_s:
            found[track] = total["measured"] / expected_s
    return found


def table(rows: Iterable[TrackSummary]) -> tuple[list[str], list[list[str]]]:
    """Return the summary as headers (">" marks a column of numbers) and rows of text.

    With measured and expected halves of one track there is a column for how far apart they are.
    """
    rows = list(rows)
    ratio = ratios(rows)
    headers = ["track", "source", "spans>", "busy>", "utilised>", "total>"]
    cells = [
        [
            row.track,
            row.source,
            f"{row.num_spans:,}",
            format_seconds(row.busy_s),
            f"{row.utilisation:.1%}",
            format_seconds(row.total_s),
        ]
        for row in rows
    ]
    if ratio:
        headers.append("difference>")
        for row, line in zip(rows, cells, strict=True):
            compared = row.source == "measured" and row.track in ratio
            line.append(difference(ratio[row.track]) if compared else "")
    return headers, cells


def difference(ratio: float) -> str:
    """Return a ratio as people compare: above or below what was expected.

    >>> difference(1.046), difference(0.5)
    ('+4.6%', '-50.0%')
    """
    return f"{ratio - 1:+.1%}"
