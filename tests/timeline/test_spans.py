import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.timeline import Counter, Span, Timeline
from toolkit.timeline.spans import pack, plain

times = st.floats(0, 100, allow_nan=False).map(lambda time_s: round(time_s, 2))
spans = st.lists(
    st.tuples(times, times).map(lambda pair: Span("s", "t", min(pair), max(pair))), max_size=40
)


def overlap(a, b):
    return a.start_s < b.end_s and b.start_s < a.end_s


@given(spans)
def test_pack_keeps_every_span_and_lets_none_overlap_in_a_slot(given_spans):
    placed = pack(given_spans)
    assert sorted(map(id, given_spans)) == sorted(id(span) for span, _ in placed)
    for at, (span, slot) in enumerate(placed):
        assert not any(slot == other_slot and overlap(span, other)
                       for other, other_slot in placed[:at])  # fmt: skip


@given(spans)
def test_pack_uses_as_few_slots_as_the_deepest_overlap(given_spans):
    placed = pack(given_spans)
    # Spans overlap pairwise exactly where they share a moment: just after one of their starts.
    deepest = max(
        (
            1 + sum(other is not span and overlap(span, other) and _covers(other, span)
                    for other in given_spans)
            for span in given_spans
        ),
        default=0,
    )  # fmt: skip
    assert max((slot + 1 for _, slot in placed), default=0) == deepest


def _covers(other, span):
    if span.duration_s == 0:
        return other.start_s < span.start_s < other.end_s
    return other.start_s <= span.start_s < other.end_s


@given(spans)
def test_pack_takes_the_lowest_free_slot(given_spans):
    placed = pack(given_spans)
    for at, (span, slot) in enumerate(placed):
        for lower in range(slot):
            assert any(
                other_slot == lower and other.end_s > span.start_s
                for other, other_slot in placed[:at]
            )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_span_must_be_finite_and_end_after_it_starts(bad):
    with pytest.raises(ValueError, match="'x' on 't'"):
        Span("x", "t", 0.0, bad)


def test_a_source_must_be_one_of_three():
    with pytest.raises(ValueError, match="guessed"):
        Span("x", "t", 0, 1, "guessed")
    with pytest.raises(ValueError, match="guessed"):
        Counter("x", (), "guessed")


def test_counters_are_finite_and_in_order():
    with pytest.raises(ValueError, match="order"):
        Counter("x", ((1.0, 0.0), (0.5, 0.0)))
    with pytest.raises(ValueError, match="finite"):
        Counter("x", ((1.0, math.nan),))


def test_halves_of_a_track_are_adjacent_whatever_order_spans_came_in():
    timeline = Timeline(
        "t",
        (
            Span("a", "one", 0, 1, "measured"),
            Span("b", "two", 0, 1, "measured"),
            Span("a", "one", 0, 1, "predicted"),
        ),
    )
    assert timeline.tracks == (("one", "predicted"), ("one", "measured"), ("two", "measured"))
    assert list(timeline.halves()) == list(timeline.tracks)
    assert timeline.on("two", "measured")[0].name == "b"
    assert timeline.on("two", "predicted") == ()


def test_aligned_starts_every_source_at_zero_and_keeps_durations():
    timeline = Timeline(
        "t",
        (
            Span("a", "t", 0.0, 1.0, "predicted"),
            Span("a", "t", 1000.5, 1002.0, "measured"),
            Span("b", "t", 1002.0, 1003.0, "measured"),
        ),
        (Counter("c", ((1001.5, 1.0),)),),
    )
    aligned = timeline.aligned()
    assert aligned.extent_s("predicted") == (0.0, 1.0)
    assert aligned.extent_s("measured") == (0.0, 2.5)
    assert aligned.counters[0].samples == ((1.0, 1.0),)
    assert aligned.duration_s == 2.5


def test_merged_keeps_spans_and_counters_of_both(step):
    merged = step.merged(step, title="twice")
    assert merged.title == "twice"
    assert len(merged.spans) == 2 * len(step.spans)
    assert len(merged.counters) == 2


def test_an_empty_timeline_lasts_no_time():
    assert Timeline("nothing").duration_s == 0.0


def test_plain_keeps_what_json_has_and_names_the_rest():
    class Odd:
        def __str__(self):
            return "odd"

    assert plain({"a": [1, 2.5, None, True], "b": Odd(), "c": math.inf}) == {
        "a": [1, 2.5, None, True],
        "b": "odd",
        "c": "inf",
    }
