import gzip
import itertools
import json

import pytest

from toolkit.timeline import Counter, Span, Timeline, perfetto


def test_spans_become_complete_events_in_microseconds():
    timeline = Timeline("t", (Span("a", "rank 0", 10.0, 10.25, "predicted", "forward", {"n": 1}),))
    events = perfetto.trace(timeline)["traceEvents"]
    (event,) = [event for event in events if event["ph"] == "X"]
    assert event["name"] == "a"
    assert event["cat"] == "forward,predicted"
    assert (event["ts"], event["dur"]) == (0.0, 250_000.0)
    assert event["args"] == {"n": 1}


def test_halves_are_processes_next_to_each_other_and_slots_are_threads(step):
    events = perfetto.trace(step)["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    order = {e["pid"]: e["args"]["sort_index"] for e in events if e["name"] == "process_sort_index"}
    assert [names[pid] for pid in sorted(order, key=order.__getitem__)] == [
        "rank 0 · predicted",
        "rank 0 · measured",
        "rank 1 · predicted",
        "rank 1 · measured",
        "activations · measured",
    ]
    threads = [e["tid"] for e in events if e["name"] == "thread_name"]
    assert len(threads) == len(set(threads))
    assert {e["tid"] for e in events if e["ph"] == "X"} <= set(threads)


def test_events_of_a_thread_never_overlap():
    spans = tuple(Span(f"s{i}", "t", i / 7, (i + 3) / 7) for i in range(50))
    events = perfetto.trace(Timeline("t", spans))["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    assert len({event["tid"] for event in complete}) == 3
    for tid in {event["tid"] for event in complete}:
        row = sorted((e for e in complete if e["tid"] == tid), key=lambda e: e["ts"])
        for before, after in itertools.pairwise(row):
            # Each is written to a nanosecond.
            assert round((before["ts"] + before["dur"]) * 1000) <= round(after["ts"] * 1000)


def test_counters_become_counter_events():
    counter = Counter("kv", ((1.0, 5.0), (2.0, 7.0)), unit="bytes")
    timeline = Timeline("t", (Span("a", "t", 0.5, 1),), (counter,))
    events = perfetto.trace(timeline)["traceEvents"]
    assert [(e["ts"], e["args"]) for e in events if e["ph"] == "C"] == [
        (500_000.0, {"bytes": 5.0}),
        (1_500_000.0, {"bytes": 7.0}),
    ]


@pytest.mark.parametrize("name", ["t.json.gz", "t.json"])
def test_the_file_is_strict_json_compressed_unless_named_json(name, step, tmp_path):
    perfetto.write(step, tmp_path / name)
    data = (tmp_path / name).read_bytes()
    text = gzip.decompress(data) if name.endswith(".gz") else data

    def refuse(constant):
        raise AssertionError(constant)

    trace = json.loads(text, parse_constant=refuse)
    assert trace["displayTimeUnit"] in ("ms", "ns")
    assert sum(event["ph"] == "X" for event in trace["traceEvents"]) == len(step.spans)


def test_the_same_timeline_makes_the_same_bytes(step, tmp_path):
    perfetto.write(step, tmp_path / "a.json.gz")
    perfetto.write(step, tmp_path / "b.json.gz")
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()


def test_details_json_cannot_hold_do_not_break_the_trace(tmp_path):
    span = Span("a", "t", 0, 1, detail={"loss": float("nan"), "path": tmp_path})
    perfetto.write(Timeline("t", (span,)), tmp_path / "t.json")
    json.loads((tmp_path / "t.json").read_text())
