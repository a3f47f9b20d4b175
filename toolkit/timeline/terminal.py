"""A timeline in the terminal: one line a slot, predicted and measured halves on adjacent lines.

With colour a span is a block of its group's colour, a dark shade of it when it was not measured;
without, each group has its own character. Both carry the span's name wherever it fits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from toolkit.timeline import palette, summary
from toolkit.timeline.spans import Counter, Span, Timeline, pack
from toolkit.units import format_bytes, format_seconds

_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
_LEVELS = "▁▂▃▄▅▆▇█"
_SLIVER = "|"


def render(
    timeline: Timeline, width: int | None = None, *, max_slots: int = 6, max_lines: int = 60
) -> Chart:
    """Return `timeline` as something rich prints, at most `width` columns wide.

    A half shows its first `max_slots` slots and the chart its first `max_lines` lines; what is
    left out is counted, not dropped in silence.
    """
    return Chart(timeline, width, max_slots, max_lines)


@dataclass(frozen=True)
class Chart:
    """What `render` returns."""

    timeline: Timeline
    width: int | None
    max_slots: int
    max_lines: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        timeline = self.timeline
        yield Text(timeline.title, style="bold")
        if not timeline.spans and not timeline.counters:
            yield Text("no spans")
            return
        in_colour = console.color_system is not None and not console.no_color
        labels = _Labels.of(timeline)
        room = max(20, min(self.width or 10**6, options.max_width) - labels.width)
        scale = _Scale(timeline.start_s, timeline.duration_s or 1e-9, room)
        places = palette.places(span.group for span in timeline.spans)
        lines = 0
        left_out = 0
        track_before = None
        for (track, source), spans in timeline.halves().items():
            placed = pack(spans)
            num_slots = 1 + max(slot for _, slot in placed)
            if lines >= self.max_lines:
                left_out += 1
                continue
            for slot in range(min(num_slots, self.max_slots)):
                row = [span for span, at in placed if at == slot]
                label = labels.line(
                    "" if slot or track == track_before else track, "" if slot else source
                )
                yield from label
                yield from _row(row, scale, places, in_colour)
                yield Segment.line()
                lines += 1
            if num_slots > self.max_slots:
                hidden = sum(slot >= self.max_slots for _, slot in placed)
                yield from labels.line("", "")
                yield Segment(f"... {num_slots - self.max_slots} more lines, {hidden} spans")
                yield Segment.line()
                lines += 1
            track_before = track
        name_before = None
        for counter in timeline.paired_counters():
            name = "" if counter.name == name_before else counter.name
            name_before = counter.name
            yield from labels.line(name, counter.source)
            yield Segment(_levels(counter, scale))
            yield Segment.line()
        if left_out:
            yield Text(f"... {left_out} more tracks: write the HTML page to see them all")
        yield from labels.line("", "")
        yield Segment(_axis(scale), Style(dim=True))
        yield Segment.line()
        yield from _legend(places, in_colour)
        yield Text(caption(timeline))


def caption(timeline: Timeline) -> str:
    """Return each source's duration, and measured against what was expected.

    >>> caption(Timeline("step", (Span("a", "t", 0, 2, "predicted"), Span("a", "t", 0, 3))))
    'predicted 2 s, measured 3 s (+50.0%)'
    """
    found = summary.durations_s(timeline)
    text = ", ".join(f"{source} {format_seconds(seconds)}" for source, seconds in found.items())
    ratio = summary.against(timeline)
    # Measured comes second among sources, so its difference from a simulation is spelled out.
    if ratio is None:
        return text
    expected = "" if "predicted" in found else " against simulated"
    measured = f"measured {format_seconds(found['measured'])}"
    return text.replace(measured, f"{measured} ({summary.difference(ratio)}{expected})")


@dataclass(frozen=True)
class _Scale:
    """Columns of `room` characters over `duration_s` seconds."""

    start_s: float
    duration_s: float
    room: int

    def column(self, time_s: float) -> float:
        return (time_s - self.start_s) / self.duration_s * self.room


@dataclass(frozen=True)
class _Labels:
    """The columns left of the chart: track, source."""

    track_width: int
    source_width: int

    @classmethod
    def of(cls, timeline: Timeline) -> _Labels:
        names = [track for track, _ in timeline.tracks] + [c.name for c in timeline.counters]
        sources = [source for _, source in timeline.tracks] + [c.source for c in timeline.counters]
        return cls(min(24, max(map(len, names))), max(map(len, sources)))

    @property
    def width(self) -> int:
        return self.track_width + self.source_width + 3

    def line(self, track: str, source: str) -> Sequence[Segment]:
        if len(track) > self.track_width:
            track = track[: self.track_width - 1] + "…"
        return (
            Segment(f"{track:<{self.track_width}} ", Style(bold=True)),
            Segment(f"{source:<{self.source_width}}  ", Style(dim=True)),
        )


def _row(
    spans: Sequence[Span], scale: _Scale, places: dict[str, int], in_colour: bool
) -> list[Segment]:
    """One slot's spans, none overlapping, as characters."""
    cells: list[tuple[str, Style | None]] = [(" ", None)] * scale.room
    for span in spans:
        first, last = scale.column(span.start_s), scale.column(span.end_s)
        # A column belongs to a span that covers its middle, so neighbours never share one.
        start, stop = math.ceil(first - 0.5), math.ceil(last - 0.5)
        style = _style(span, places[span.group]) if in_colour else None
        if start >= stop:
            at = min(int(first), scale.room - 1)
            if cells[at][0] == " " and cells[at][1] is None:
                thin = Style(color=palette.COLOURS[places[span.group]]) if in_colour else None
                cells[at] = (_SLIVER, thin)
            continue
        width = stop - start
        fill = palette.GLYPHS[places[span.group]]
        if in_colour:
            fill = " " if span.source == "measured" else "·"
        name = _printable(span.name)
        text = name if len(name) < width or (in_colour and len(name) == width) else ""
        for offset, character in enumerate(text + fill * (width - len(text))):
            if 0 <= start + offset < scale.room:
                cells[start + offset] = (character, style)
    return [
        Segment("".join(character for character, _ in run), style)
        for style, run in itertools.groupby(cells, key=lambda cell: cell[1])
    ]


def _style(span: Span, place: int) -> Style:
    colour = palette.COLOURS[place]
    if span.source != "measured":
        return Style(color="#ffffff", bgcolor=palette.shade(colour))
    return Style(color=palette.ink(colour), bgcolor=colour)


def _printable(name: str) -> str:
    # One column a character: control and wide characters would break the line.
    return "".join(c if c.isprintable() and ord(c) < 0x1100 else "?" for c in name)


def _levels(counter: Counter, scale: _Scale) -> str:
    """A counter as a row of levels, each column the largest value within it."""
    if not counter.samples:
        return ""
    highest = max(0.0, *(value for _, value in counter.samples))
    ends_s = [time_s for time_s, _ in counter.samples[1:]] + [scale.start_s + scale.duration_s]
    columns: list[float | None] = [None] * scale.room
    for (time_s, value), end_s in zip(counter.samples, ends_s, strict=True):
        first = int(scale.column(time_s))
        for at in range(max(first, 0), min(math.ceil(scale.column(end_s)), scale.room)):
            columns[at] = max(value, columns[at] or 0.0)
    drawn = "".join(
        " " if value is None else _LEVELS[round(max(value, 0.0) / (highest or 1.0) * 7)]
        for value in columns
    )
    top = format_bytes(highest) if counter.unit in ("B", "bytes") else f"{highest:.4g}"
    unit = "" if counter.unit in ("B", "bytes") else f" {counter.unit}".rstrip()
    note = f" max {top}{unit}"
    return drawn[: scale.room - len(note)] + note if len(note) < scale.room // 2 else drawn


def _axis(scale: _Scale) -> str:
    """Ticks at 1, 2 or 5 times a power of ten, at least 10 columns apart."""
    least_s = scale.duration_s * 10 / scale.room
    power = 10.0 ** math.floor(math.log10(least_s))
    step_s = next(power * by for by in (1, 2, 5, 10) if power * by >= least_s * 0.999)
    size, unit = next(((s, u) for s, u in _UNITS if scale.duration_s >= s), _UNITS[-1])
    digits = max(0, math.ceil(-math.log10(step_s / size) - 1e-9))
    line = ""
    for tick in range(int(scale.duration_s / step_s) + 1):
        at = round(tick * step_s / scale.duration_s * scale.room)
        label = f"|{tick * step_s / size:.{digits}f} {unit}"
        if at + len(label) <= scale.room:
            line = line.ljust(at) + label
    return line


def _legend(places: dict[str, int], in_colour: bool) -> RenderResult:
    legend = Text()
    for group, place in places.items():
        swatch = Style(bgcolor=palette.COLOURS[place]) if in_colour else Style()
        legend.append("  " if in_colour else palette.GLYPHS[place] * 2, swatch)
        legend.append(f" {group or 'no group'}   ")
    if legend:
        legend.rstrip()
        yield legend
