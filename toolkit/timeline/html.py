"""One self-contained HTML page: timelines to zoom and search, tables above them, no network.

page.html holds the page and its script; this fills in the data. The page's content security policy
forbids loading anything, so it reads the same from a mail attachment as from a server.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import toolkit
from toolkit import record
from toolkit.timeline import palette, summary
from toolkit.timeline.spans import SOURCES, Timeline, pack, plain
from toolkit.units import format_seconds

_SLOT = re.compile(r"<!--\{(\w+)\}-->")
# Longer summaries start folded: the picture comes first.
_OPEN_ROWS = 8


@dataclass(frozen=True)
class Table:
    """A table above the timelines. A header ending in ">" is a column of numbers.

    The caption says whether its figures are predicted or measured.
    """

    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.headers):
                raise ValueError(
                    f"table {self.caption!r}: {len(row)} cells under {len(self.headers)} headers"
                )


def write(
    timelines: Timeline | Iterable[Timeline],
    path: Path,
    *,
    title: str | None = None,
    intro_html: str | None = None,
    tables: Iterable[Table] = (),
) -> None:
    """Write one page with `timelines` under their titles, after `intro_html` and `tables`.

    All text is escaped except `intro_html`, which is put in as it is: never build it from input.
    """
    chosen = [timelines] if isinstance(timelines, Timeline) else list(timelines)
    page = render(chosen, title=title, intro_html=intro_html, tables=tables)
    # A lone surrogate (a file name that is no UTF-8) is shown as "?" rather than stopping the page.
    record.write_bytes(path, page.encode("utf-8", errors="replace"))


def render(
    timelines: Sequence[Timeline],
    *,
    title: str | None = None,
    intro_html: str | None = None,
    tables: Iterable[Table] = (),
) -> str:
    """Return the page `write` writes."""
    colours = palette.colours(span.group for timeline in timelines for span in timeline.spans)
    data = {
        "groups": [
            {"name": name, "colour": colour, "ink": palette.ink(colour)}
            for name, colour in colours.items()
        ],
        "timelines": [_columns(timeline, list(colours)) for timeline in timelines],
    }
    page_title = html.escape(title or (timelines[0].title if timelines else "Timeline"))
    sections = [_section(at, timeline, page_title) for at, timeline in enumerate(timelines)]
    filled = {
        "title": page_title,
        "intro": intro_html or "",
        "tables": "\n".join(_table(table) for table in tables),
        "timelines": "\n".join(sections),
        "version": html.escape(toolkit.__version__),
        "data": _script_safe(data),
    }
    template = resources.files("toolkit.timeline").joinpath("page.html").read_text("utf-8")
    # One pass: text that happens to look like a slot is not filled a second time.
    return _SLOT.sub(lambda found: filled[found[1]], template)


def _script_safe(data: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever a span is called."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _columns(timeline: Timeline, groups: list[str]) -> dict[str, Any]:
    """Spans as columns, in whole nanoseconds since the first one, ordered by half, slot and start.

    `rows` of a half are [from, to) into the columns: one row a slot, so the page draws and finds
    spans by binary search.
    """
    zero_s = timeline.start_s
    group_at = {name: at for at, name in enumerate(groups)}
    names: dict[str, int] = {}
    columns: dict[str, list[Any]] = {key: [] for key in ("start", "length", "name", "group")}
    details: dict[int, Any] = {}
    halves = []
    for (track, source), spans in timeline.halves().items():
        rows: list[list[int]] = []
        slot_before = -1
        placed = sorted(pack(spans), key=lambda pair: pair[1])  # stable: by start within a slot
        for span, slot in placed:
            at = len(columns["start"])
            start_ns = round((span.start_s - zero_s) * 1e9)
            end_ns = round((span.end_s - zero_s) * 1e9)
            columns["start"].append(start_ns)
            columns["length"].append(end_ns - start_ns)
            columns["name"].append(names.setdefault(span.name, len(names)))
            columns["group"].append(group_at[span.group])
            if span.detail:
                details[at] = plain(span.detail)
            if slot != slot_before:
                rows.append([at, at])
                slot_before = slot
            rows[-1][1] = at + 1
        halves.append({"track": track, "source": source, "rows": rows})
    return {
        "title": timeline.title,
        "length": round(timeline.duration_s * 1e9),
        "names": list(names),
        "columns": columns,
        "details": details,
        "halves": halves,
        "counters": [
            {
                "name": counter.name,
                "source": counter.source,
                "unit": counter.unit,
                "times": [round((time_s - zero_s) * 1e9) for time_s, _ in counter.samples],
                "values": [value for _, value in counter.samples],
            }
            for counter in timeline.paired_counters()
        ],
    }


def _section(at: int, timeline: Timeline, page_title: str) -> str:
    rows = summary.tracks(timeline)
    title = html.escape(timeline.title)
    heading = "" if title == page_title else f"<h2>{title}</h2>\n"
    return f"""<section class="timeline" aria-label="{title}">
{heading}<p class="makespan">{html.escape(_makespan(timeline))}</p>
<div class="plot" data-timeline="{at}"></div>
<details class="summary"{" open" if len(rows) <= _OPEN_ROWS else ""}>
<summary>Summary by track</summary>
{_table(_summary_table(timeline, rows))}
</details>
</section>"""


def _makespan(timeline: Timeline) -> str:
    """The durations of the sources, and how far measured is from what was expected."""
    duration_s = summary.durations_s(timeline)
    parts = [f"{source} {format_seconds(length_s)}" for source, length_s in duration_s.items()]
    ratio = summary.against(timeline)
    if ratio is not None:
        expected = next(source for source in duration_s if source != "measured")
        parts.append(f"measured against {expected} {summary.difference(ratio)}")
    return " · ".join(parts) or "no spans"


def _summary_table(timeline: Timeline, rows: Sequence[summary.TrackSummary]) -> Table:
    sources = [source for source in SOURCES if any(row.source == source for row in rows)]
    headers, cells = summary.table(rows)
    caption = f"{timeline.title}: {' and '.join(sources) or 'no'} time by track"
    return Table(caption, headers, cells)


def _table(table: Table) -> str:
    numeric = [header.endswith(">") for header in table.headers]

    def cells(row: Sequence[Any], tag: str, scope: str = "") -> str:
        return "".join(
            f"<{tag}{scope}{' class=number' if number else ''}>{html.escape(str(cell))}</{tag}>"
            for cell, number in zip(row, numeric, strict=True)
        )

    head = cells([header.removesuffix(">") for header in table.headers], "th", " scope=col")
    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in table.rows)
    return (
        f'<div class="table"><table><caption>{html.escape(table.caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )
