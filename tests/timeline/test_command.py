import gzip
import json

import pytest
from typer.testing import CliRunner

from toolkit.cli import timeline as command
from toolkit.errors import FormatError, UsageError
from toolkit.timeline import Timeline, files

runner = CliRunner()


@pytest.fixture
def saved(step, tmp_path):
    path = tmp_path / "step.json"
    files.save(step, path)
    return path


def run(*arguments):
    result = runner.invoke(command.app, [str(part) for part in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_show_draws_the_chart_and_the_summary(saved):
    text = run("show", saved).output
    assert "one step" in text
    assert "== forward" in text
    assert "utilised" in text


def test_show_as_json_is_one_object(saved, step):
    facts = json.loads(run("show", saved, "--json").output)["timelines"][0]
    assert facts["num_spans"] == len(step.spans)
    assert facts["measured_over_expected"] > 1
    assert {"track", "source", "busy_s", "utilisation", "num_spans"} <= set(facts["tracks"][0])


@pytest.mark.parametrize("name", ["out.html", "out.json.gz", "out.json", "out.txt"])
def test_export_writes_what_the_suffix_names(name, saved, tmp_path):
    facts = json.loads(run("export", saved, "-o", tmp_path / name, "--json").output)
    data = (tmp_path / name).read_bytes()
    assert facts["num_bytes"] == len(data)
    if name.endswith("gz"):
        assert json.loads(gzip.decompress(data))["traceEvents"]
    elif name.endswith("json"):
        assert json.loads(data)["traceEvents"]
    elif name.endswith("html"):
        assert data.startswith(b"<!doctype html>")
    else:
        assert "== forward" in data.decode()


def test_merging_puts_two_clocks_on_one_axis(step, tmp_path):
    later = Timeline("run", step.on("rank 0", "measured")).aligned()
    shifted = Timeline(
        "run", tuple(type(s)(s.name, s.track, s.start_s + 1e6, s.end_s + 1e6) for s in later.spans)
    )
    files.save(Timeline("plan", step.on("rank 0", "predicted")), tmp_path / "plan.json")
    files.save(shifted, tmp_path / "run.json")
    output = run("show", tmp_path / "plan.json", tmp_path / "run.json", "--merge", "--json").output
    (merged,) = json.loads(output)["timelines"]
    assert merged["title"] == "plan and run"
    assert [row["source"] for row in merged["tracks"]] == ["predicted", "measured"]
    assert 0.5 < merged["measured_over_expected"] < 2


def test_an_unknown_suffix_lists_the_known_ones(saved, tmp_path):
    with pytest.raises(UsageError, match=r"cannot tell a format from the name 'out.pdf'.*\.html"):
        run("export", saved, "-o", tmp_path / "out.pdf")


def test_a_trace_holds_one_timeline(saved, tmp_path):
    with pytest.raises(UsageError, match="holds one timeline, not 2"):
        run("export", saved, saved, "-o", tmp_path / "out.json.gz")


def test_an_export_never_replaces_what_it_reads(saved):
    before = saved.read_bytes()
    with pytest.raises(UsageError, match="being read"):
        run("export", saved, "-o", saved)
    assert saved.read_bytes() == before


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        run("show", tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"format": "toolkit/timeli')
    with pytest.raises(FormatError, match="corrupt"):
        run("show", tmp_path / "torn.json")
