"""Lines over a load as a vector picture that needs nothing: for pages that load nothing."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from toolkit.timeline.palette import COLOURS

_WIDTH, _HEIGHT = 380, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 10, 26, 34
# Lines that share a colour are told apart by their dashes.
_DASHES = ("", "6 3", "2 2")

Points = Sequence[tuple[float, float]]


def style(place: int) -> tuple[str, str]:
    """Return the colour and dashes of the line at a place in the legend."""
    return COLOURS[place % len(COLOURS)], _DASHES[place // len(COLOURS) % len(_DASHES)]


def chart(
    title: str, lines: Mapping[str, Points], *, places: Mapping[str, int], unit: str, across: str
) -> str:
    """Return an SVG of `lines` by name, (x, y) each, y logarithmic where it spans much.

    `places` give each name its style; `unit` is written at the y axis and `across` at the x axis.
    """
    xs = [x for line in lines.values() for x, _ in line]
    ys = [y for line in lines.values() for _, y in line if y > 0]
    if not xs or not ys:
        return ""
    logarithmic = max(ys) > 8 * min(ys)
    low, high = (min(ys) / 1.15, max(ys) * 1.15) if logarithmic else (0.0, max(ys) * 1.08)
    ticks = _decades(low, high) if logarithmic else _steps(high)
    first, last = min(xs), max(xs)
    if first == last:
        first, last = first - 0.5, last + 0.5

    def across_px(x: float) -> float:
        return _LEFT + (x - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def down_px(y: float) -> float:
        part = math.log(y / low) / math.log(high / low) if logarithmic else y / high
        return _HEIGHT - _BOTTOM - part * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">',
        f'<text x="{_LEFT}" y="15" class="title">{html.escape(title)} [{html.escape(unit)}]</text>',
    ]
    for tick in ticks:
        at = down_px(tick)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{at + 3:.1f}" class="y">{tick:g}</text>')
    for x in _few(sorted(set(xs))):
        at = across_px(x)
        parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 14}" class="x">{x:g}</text>')
    parts.append(
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 4}" class="x">'
        f"{html.escape(across)}</text>"
    )
    for name, line in lines.items():
        colour, dashes = style(places[name])
        shown = [(across_px(x), down_px(y), x, y) for x, y in line if y > 0]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in shown)
        parts.append(f'<g data-name="{html.escape(name)}" stroke="{colour}" fill="{colour}">')
        parts.append(f'<polyline points="{path}" stroke-dasharray="{dashes}"/>')
        for x_px, y_px, x, y in shown:
            said = html.escape(f"{name} at {x:g}: {y:.4g} {unit}")
            parts.append(f'<circle cx="{x_px:.1f}" cy="{y_px:.1f}" r="3">')
            parts.append(f"<title>{said}</title></circle>")
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten in a range, thinned where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [digit * 10.0**power for power in powers for digit in digits]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) <= 8:
            break
    return found


def _steps(high: float) -> list[float]:
    """Four to eight round steps from zero."""
    raw = high / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((digit * power for digit in (1, 2, 5, 10)), key=lambda one: abs(one - raw))
    return [index * step for index in range(int(high / step) + 1)]


def _few(values: Sequence[float]) -> Sequence[float]:
    """At most eight of the values, evenly."""
    return values[:: -(-len(values) // 8)]
