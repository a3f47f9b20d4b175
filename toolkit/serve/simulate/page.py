"""A sweep as one HTML page that needs no network: curves, table, the paper's figures beside."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import toolkit
from toolkit import record
from toolkit.serve.simulate import curves, published
from toolkit.units import format_seconds

_LATENCIES = (
    ("ttft_s", "time to first token"),
    ("tbt_s", "time between tokens"),
    ("e2e_s", "end to end"),
)
_PERCENTILES = ("p50", "p95", "p99")

_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 1240px;
  padding: 0 1rem; }
h1 { font-size: 1.35rem; } h2 { font-size: 1.1rem; margin-top: 1.8rem; }
.note { border-left: 4px solid #d55e00; padding: .2rem .8rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1rem; }
svg { width: 100%; } svg text { font-size: 10px; fill: currentColor; }
svg text.title { font-size: 12px; font-weight: 600; }
svg text.y { text-anchor: end; } svg text.x { text-anchor: middle; }
svg line { stroke: var(--line); } svg polyline { fill: none; stroke-width: 1.8; }
svg g.off, tr.off { display: none; }
.legend { position: sticky; top: 0; background: Canvas; padding: .4rem 0; z-index: 1; }
.legend label { margin-right: 1rem; white-space: nowrap; }
.swatch { display: inline-block; width: 1.6em; border-top: 3px solid; vertical-align: middle;
  margin-right: .3em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
"""

_SCRIPT = """
document.querySelectorAll('.legend input').forEach(box => box.addEventListener('change', () =>
  document.querySelectorAll('[data-name]').forEach(one => {
    if (one.dataset.name === box.value) one.classList.toggle('off', !box.checked); })));
"""


def write(body: Mapping[str, Any], path: Path) -> None:
    """Write the page of a sweep, as `toolkit serve simulate --json` prints it."""
    record.write_bytes(path, render(body).encode("utf-8"))


def render(body: Mapping[str, Any]) -> str:
    """Return the page of a sweep, as `toolkit serve simulate --json` prints it."""
    runs = body["runs"]
    names = list(dict.fromkeys(run["system"] for run in runs))
    places = {name: place for place, name in enumerate(names)}
    device = f"{body['num_devices']} x {body['device']}"
    place = device if body["num_devices"] > 1 else body["device"]
    title = f"{body['model']} on {place}, {body['workload']}"
    requests = runs[0]["num_requests"] if runs else 0
    about = (
        f"{requests} requests at each rate, {body['dtype']}, KV cache of "
        f"{body['kv_tokens']} tokens, seed {body['seed']}; toolkit {toolkit.__version__}."
    )
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width'>",
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; "
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">",
        f"<title>{html.escape(title)} (simulated)</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}: latency against load, simulated</h1>",
        "<p class=note>Everything here is <b>simulated</b>: the engine's own scheduler on virtual "
        "time, with step times from the cost model. Nothing was measured. Systems of others are "
        "modelled in their scheduling alone. Compare lines; do not quote seconds.</p>",
        f"<p>{html.escape(about)}</p>",
        _legend(places),
        _charts(runs, names, places),
        _beside(body),
        _table(runs),
        f"<script>{_SCRIPT}</script></html>",
    ]
    return "\n".join(parts)


def _legend(places: Mapping[str, int]) -> str:
    boxes = []
    for name, place in places.items():
        colour, dashes = curves.style(place)
        line = "dashed" if dashes else "solid"
        swatch = f'<span class=swatch style="border-color:{colour};border-top-style:{line}"></span>'
        said = html.escape(name)
        boxes.append(f'<label><input type=checkbox checked value="{said}">{swatch}{said}</label>')
    return f"<div class=legend>{''.join(boxes)}</div>"


def _charts(
    runs: Sequence[Mapping[str, Any]], names: Sequence[str], places: Mapping[str, int]
) -> str:
    charts = []
    for key, text in _LATENCIES:
        for name in _PERCENTILES:
            lines = {system: _points(runs, system, key, name) for system in names}
            charts.append(_chart(f"{text}, {name}", lines, places, "s"))
    for key, text in (
        ("normalised_s", "end to end / output tokens, mean"),
        ("output_tokens_per_s", "output tokens a second"),
        ("requests_per_s", "requests served a second"),
    ):
        statistic, unit = ("mean", "s") if key == "normalised_s" else (None, "1/s")
        lines = {system: _points(runs, system, key, statistic) for system in names}
        charts.append(_chart(text, lines, places, unit))
    return f"<div class=charts>{''.join(f'<div>{one}</div>' for one in charts if one)}</div>"


def _chart(
    title: str, lines: Mapping[str, curves.Points], places: Mapping[str, int], unit: str
) -> str:
    return curves.chart(title, lines, places=places, unit=unit, across="requests sent a second")


def _points(
    runs: Sequence[Mapping[str, Any]], system: str, key: str, statistic: str | None
) -> curves.Points:
    found = []
    for run in runs:
        if run["system"] != system or run["rate"] is None:
            continue
        value = run[key] if statistic is None else (run[key] or {}).get(statistic)
        if value is not None:
            found.append((run["rate"], value))
    return found


def _beside(body: Mapping[str, Any]) -> str:
    rows = published.beside(body)
    if not rows:
        return ""
    head = ("", "paper (GPUs)", "as the paper, simulated", "auto, simulated")
    note = (
        "<p>Ratios; above 1 the system named first is better. Least to greatest over the rates. "
        "The paper: Nexus, arXiv 2507.06608 v5, whose figures are of real GPUs and other kernels."
        "</p>"
    )
    return f"<h2>The paper's figures beside</h2>{note}{_rows(head, rows)}"


def _table(runs: Sequence[Mapping[str, Any]]) -> str:
    head = ["system", "requests/s", "out tok/s"]
    for short in ("TTFT", "TBT", "e2e"):
        head += [f"{short} {name}" for name in _PERCENTILES]
    rows = []
    for run in runs:
        sent = "at once" if run["rate"] is None else f"{run['rate']:g}"
        cells = [run["system"], sent, f"{run['output_tokens_per_s']:.1f}"]
        for key, _ in _LATENCIES:
            spread = run[key] or {}
            cells += [
                format_seconds(spread[name]) if name in spread else "-" for name in _PERCENTILES
            ]
        rows.append(cells)
    return f"<h2>All runs, simulated</h2>{_rows(head, rows, named=True)}"


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]], *, named: bool = False) -> str:
    parts = ["<div class=scroll><table><tr>"]
    parts += [f"<th>{html.escape(cell)}</th>" for cell in head]
    for row in rows:
        name = f' data-name="{html.escape(row[0])}"' if named else ""
        parts.append(f"</tr><tr{name}>")
        parts += [f"<td>{html.escape(cell)}</td>" for cell in row]
    return "".join([*parts, "</tr></table></div>"])
