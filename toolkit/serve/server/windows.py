"""The engine's timeline, or a window of it, in the forms people look at."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Literal

from fastapi import Response
from fastapi.responses import HTMLResponse, JSONResponse

from toolkit import record
from toolkit.serve.engine import Engine
from toolkit.timeline import Counter, Timeline, files, html, perfetto

Form = Literal["record", "html", "perfetto"]


def answer(
    engine: Engine, title: str, form: Form, since_s: float | None, until_s: float | None
) -> Response:
    """Return what of the engine's recent steps and requests lies in a window, as `form`.

    Times are the engine's; those below 0 count back from now. None is the first or last there is.
    """
    whole, now_s = engine.timeline(title), engine.clock.now()
    first_s, last_s = (
        now_s + at_s if at_s is not None and at_s < 0 else at_s for at_s in (since_s, until_s)
    )
    found = window(whole, first_s, last_s)
    if form == "html":
        return HTMLResponse(html.render([found]))
    if form == "perfetto":
        body = json.dumps(perfetto.trace(found), separators=(",", ":"), allow_nan=False)
        saved = {"Content-Disposition": 'attachment; filename="serving-trace.json"'}
        return Response(body, media_type="application/json", headers=saved)
    return JSONResponse(_record(found))


def window(whole: Timeline, first_s: float | None, last_s: float | None) -> Timeline:
    """Return the spans that touch [first_s, last_s], whole, and the counters' values in it."""
    low = float("-inf") if first_s is None else first_s
    high = float("inf") if last_s is None else last_s
    return replace(
        whole,
        spans=tuple(span for span in whole.spans if span.end_s >= low and span.start_s <= high),
        counters=tuple(_cut(counter, low, high) for counter in whole.counters),
    )


def _cut(counter: Counter, low: float, high: float) -> Counter:
    held = [(at_s, value) for at_s, value in counter.samples if low <= at_s <= high]
    return replace(counter, samples=tuple(held))


def _record(timeline: Timeline) -> dict[str, Any]:
    body = files.to_json(timeline)
    return {
        "format": f"toolkit/{files.KIND}",
        "version": files.VERSION,
        "digest": record.digest(body),
        "provenance": record.provenance(),
        "body": body,
    }
