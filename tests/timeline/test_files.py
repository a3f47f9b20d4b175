import pytest

from toolkit import record
from toolkit.errors import FormatError, UsageError
from toolkit.timeline import Span, Timeline, files


def test_what_is_saved_is_what_is_loaded(step, tmp_path):
    files.save(step, tmp_path / "step.json")
    assert files.load(tmp_path / "step.json") == step


def test_details_json_cannot_hold_are_kept_as_text(tmp_path):
    timeline = Timeline("t", (Span("a", "t", 0, 1, detail={"shape": (2, 3), "at": tmp_path}),))
    files.save(timeline, tmp_path / "t.json")
    detail = files.load(tmp_path / "t.json").spans[0].detail
    assert detail == {"shape": [2, 3], "at": str(tmp_path)}


def test_a_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        files.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        {"title": "t", "spans": [{"name": "a"}], "counters": []},
        {"title": "t", "spans": [], "counters": [{"name": "c", "samples": [[1, 2, 3]]}]},
        {
            "title": "t",
            "counters": [],
            "spans": [{"name": "a", "track": "t", "start_s": 2, "end_s": 1}],
        },
    ],
)
def test_a_record_that_holds_no_timeline_is_named(body, tmp_path):
    record.write(tmp_path / "t.json", kind="timeline", version=1, body=body)
    with pytest.raises(FormatError, match="is not a timeline"):
        files.load(tmp_path / "t.json")


def test_another_kind_of_record_is_named(tmp_path):
    record.write(tmp_path / "p.json", kind="plan", version=1, body={})
    with pytest.raises(FormatError, match="not a timeline file"):
        files.load(tmp_path / "p.json")
