import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.timeline import Span, Timeline, palette, summary


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=20))
def test_busy_counts_each_moment_once(pairs):
    spans = [Span("s", "t", min(pair), max(pair)) for pair in pairs]
    moments = {at for span in spans for at in range(int(span.start_s), int(span.end_s))}
    assert summary.busy(spans) == len(moments)


def test_tracks_compare_measured_with_predicted(step):
    rows = summary.tracks(step)
    assert [(row.track, row.source) for row in rows] == list(step.tracks)
    predicted, measured = rows[0], rows[1]
    assert predicted.total_s == pytest.approx(4 * (4e-3 + 8e-3))
    assert predicted.utilisation == pytest.approx(
        predicted.busy_s / summary.durations_s(step)["predicted"]
    )
    assert summary.ratios(rows)["rank 0"] == pytest.approx(measured.total_s / predicted.total_s)


def test_a_difference_column_only_where_there_is_something_to_compare(step):
    headers, cells = summary.table(summary.tracks(step))
    assert headers[-1] == "difference>"
    assert [line[-1] != "" for line in cells] == [False, True, False, True]
    alone = Timeline("t", (Span("a", "t", 0, 1),))
    assert "difference>" not in summary.table(summary.tracks(alone))[0]


def test_groups_keep_their_colour_and_do_not_share_one():
    together = palette.places(["forward", "backward", "mine", "yours", "decode"])
    assert len(set(together.values())) == 5
    assert palette.places(["forward"])["forward"] == together["forward"]
    assert palette.places(["mine"]) == palette.places(["mine"])
    many = palette.places([str(at) for at in range(40)])
    assert len(many) == 40
    assert set(many.values()) == set(range(len(palette.COLOURS)))
    assert len(palette.GLYPHS) == len(palette.COLOURS)
