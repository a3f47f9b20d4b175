"""The whole idea, as a newcomer runs it: `toolkit demo --quick`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.timeline import files


@pytest.fixture(scope="module")
def demo(tmp_path_factory, smollm2_gguf, minilm_dir):
    folder = tmp_path_factory.mktemp("demo")
    probed = tmp_path_factory.mktemp("probe") / "this.json"
    done = subprocess.run(
        [sys.executable, "-m", "toolkit", "demo", "--quick", "--json", "-o", str(folder)],
        capture_output=True, text=True, timeout=900, check=False,
        env={key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        | {"TOOLKIT_PROBE": str(probed)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.timeout(900)
def test_the_plan_trains_as_one_device_would(demo):
    _, found = demo
    trained = found["steps"]["train"]
    assert trained["ranks"] == 2
    assert trained["losses"][-1] < trained["losses"][0]
    parity = trained["parity"][0]
    assert parity["num_gradients"] > 0
    assert not parity["missing"]
    assert parity["gradient_error"] <= parity["tolerance"]
    assert trained["strategy"] == found["steps"]["plan"]["strategy"]


@pytest.mark.timeout(900)
def test_what_is_sent_is_what_was_predicted(demo):
    _, found = demo
    traffic = found["steps"]["verify"]["traffic"]
    assert traffic
    assert all(row["counted"] == row["predicted"] for row in traffic)


@pytest.mark.timeout(900)
def test_the_answer_cites_passages_that_are_there(demo):
    _, found = demo
    answer = found["steps"]["serve_and_ask"]["answer"]
    assert answer["text"].strip()
    assert answer["citations"]
    library = Path(os.__file__).parent
    for citation in answer["citations"]:
        hit = answer["hits"][citation["number"] - 1]
        lines = (library / hit["source"]).read_text().splitlines()
        assert hit["end_line"] <= len(lines)
        said = " ".join("\n".join(lines[hit["start_line"] - 1 : hit["end_line"]]).split())
        assert hit["text"].split()[0] in said


@pytest.mark.timeout(900)
def test_the_page_shows_predicted_and_measured(demo):
    folder, found = demo
    page = Path(found["report"])
    assert page == folder / "report.html"
    text = page.read_text()
    for what in ("predicted", "measured", "one training step", "serving smollm2-135m"):
        assert what in text
    planned, trained = (files.load(folder / name) for name in ("planned.json", "trained.json"))
    assert {span.source for span in planned.spans} == {"predicted"}
    assert {span.source for span in trained.spans} == {"measured"}
    assert {span.track for span in planned.spans} & {span.track for span in trained.spans}
