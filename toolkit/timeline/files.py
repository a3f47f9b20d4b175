"""A timeline on disk: a record of kind "timeline", version 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolkit import record
from toolkit.errors import FormatError
from toolkit.timeline.spans import Counter, Span, Timeline, plain

KIND, VERSION = "timeline", 1


def save(timeline: Timeline, path: Path) -> str:
    """Write `timeline` to `path`, whole or not at all; return its digest.

    Details come back as JSON holds them: tuples as lists, anything else unknown to JSON as text.
    """
    return record.write(path, kind=KIND, version=VERSION, body=to_json(timeline))


def load(path: Path) -> Timeline:
    """Read what `save` wrote. Raises UsageError when missing, FormatError when it is not that."""
    body = record.read(path, kind=KIND, version=VERSION)["body"]
    try:
        return from_json(body)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path} is not a timeline: {error!r}") from error


def to_json(timeline: Timeline) -> dict[str, Any]:
    """Return the record's body: JSON values only, seconds throughout."""
    return {
        "title": timeline.title,
        "spans": [
            {
                "name": span.name,
                "track": span.track,
                "start_s": span.start_s,
                "end_s": span.end_s,
                "source": span.source,
                "group": span.group,
                "detail": plain(span.detail),
            }
            for span in timeline.spans
        ],
        "counters": [
            {
                "name": counter.name,
                "source": counter.source,
                "unit": counter.unit,
                "samples": [list(sample) for sample in counter.samples],
            }
            for counter in timeline.counters
        ],
    }


def from_json(body: dict[str, Any]) -> Timeline:
    """Return the timeline `to_json` described. Raises KeyError, TypeError or ValueError."""
    counters = []
    for row in body["counters"]:
        samples = tuple((float(time_s), float(value)) for time_s, value in row["samples"])
        counters.append(Counter(**{**row, "samples": samples}))
    return Timeline(
        title=str(body["title"]),
        spans=tuple(Span(**row) for row in body["spans"]),
        counters=tuple(counters),
    )
