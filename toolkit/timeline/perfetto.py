"""Chrome trace-event JSON, which ui.perfetto.dev and chrome://tracing open.

A process is a track half ("rank 0 · measured"), a thread a slot of it, so that spans never overlap
on a thread; processes are sorted so that predicted and measured halves lie next to each other.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import toolkit
from toolkit import record
from toolkit.timeline.spans import Timeline, pack, plain


def write(timeline: Timeline, path: Path) -> None:
    """Write the trace of `timeline`, compressed unless `path` ends in ".json"."""
    data = json.dumps(trace(timeline), separators=(",", ":"), allow_nan=False).encode()
    if path.suffix != ".json":
        # No clock in the header: the same timeline makes the same bytes.
        data = gzip.compress(data, mtime=0)
    record.write_bytes(path, data)


def trace(timeline: Timeline) -> dict[str, Any]:
    """Return the trace as JSON values: microseconds since the timeline's first span."""
    return {
        "displayTimeUnit": "ms",
        "otherData": {"title": timeline.title, "writer": f"toolkit {toolkit.__version__}"},
        "traceEvents": list(_events(timeline)),
    }


def _events(timeline: Timeline) -> Iterator[dict[str, Any]]:
    zero_s = timeline.start_s
    halves = timeline.halves()
    # Perfetto keeps one list of thread ids for the whole trace: none may be used twice.
    next_tid = len(halves) + len(timeline.counters) + 1
    pid = 0
    for (track, source), spans in halves.items():
        pid += 1
        yield from _process(pid, f"{track} · {source}")
        placed = pack(spans)
        num_slots = 1 + max(slot for _, slot in placed)
        for slot in range(num_slots):
            name = track if num_slots == 1 else f"{track} {slot + 1}/{num_slots}"
            yield _metadata("thread_name", pid, next_tid + slot, name=name)
            yield _metadata("thread_sort_index", pid, next_tid + slot, sort_index=slot)
        for span, slot in placed:
            start_ns, end_ns = _ns(span.start_s - zero_s), _ns(span.end_s - zero_s)
            yield {
                "ph": "X",
                "name": span.name,
                "cat": ",".join(filter(None, (span.group, source))),
                "pid": pid,
                "tid": next_tid + slot,
                "ts": start_ns / 1000,
                "dur": (end_ns - start_ns) / 1000,
                "args": plain(span.detail),
            }
        next_tid += num_slots
    for counter in timeline.paired_counters():
        pid += 1
        yield from _process(pid, f"{counter.name} · {counter.source}")
        for time_s, value in counter.samples:
            yield {
                "ph": "C",
                "name": counter.name,
                "pid": pid,
                "ts": _ns(time_s - zero_s) / 1000,
                "args": {counter.unit or "value": value},
            }


def _ns(seconds: float) -> int:
    # Whole nanoseconds: a start and the end before it stay equal after rounding.
    return round(seconds * 1e9)


def _process(pid: int, name: str) -> Iterator[dict[str, Any]]:
    yield _metadata("process_name", pid, name=name)
    yield _metadata("process_sort_index", pid, sort_index=pid)


def _metadata(kind: str, pid: int, tid: int | None = None, **args: Any) -> dict[str, Any]:
    where = {"pid": pid} if tid is None else {"pid": pid, "tid": tid}
    return {"ph": "M", "name": kind, **where, "args": args}
