"""A server whose cores are divided: same answers, its metrics, its page, and what faults cost."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from toolkit.serve.executor import phases
from toolkit.serve.request import Phase
from toolkit.serve.server.windows import window
from toolkit.serve.split.engine import DividedEngine
from toolkit.serve.split.settings import SplitSettings
from toolkit.timeline import Counter, Span, Timeline, files

Start = Callable[..., Any]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
FIXED = {"threads": 2, "split": SplitSettings("fixed")}


def test_it_answers_as_the_undivided_one(start: Start) -> None:
    asked = {"prompt": ["Hello there", "a b c d e f g h" * 20], "max_tokens": 12, "n": 2, "seed": 3}
    texts = []
    for settings in ({}, FIXED, FIXED | {"split": SplitSettings("auto")}):
        answer = start(**settings).ask(**asked, temperature=1.0)
        texts.append([choice.text for choice in answer.choices])
    assert texts[0] == texts[1] == texts[2]


def test_metrics_of_the_split(start: Start) -> None:
    served = start(**FIXED)
    served.ask(prompt=["a b c"] * 3, max_tokens=9)
    assert served.metric("toolkit:split_units", phase="prefill") == 1
    assert served.metric("toolkit:split_units", phase="decode") == 1
    assert served.metric("toolkit:split_undivided") == 0
    for kind in ("prefill", "decode"):
        assert served.metric("toolkit:phase_step_seconds_count", phase=kind) >= 1
        assert served.metric("toolkit:phase_step_seconds_sum", phase=kind) > 0
        assert served.metric("toolkit:phase_step_predicted_seconds_total", phase=kind) > 0
        assert served.metric("toolkit:phase_prediction_error", phase=kind) >= 0
    assert served.metric("vllm:generation_tokens_total") == 27


def test_an_undivided_server_has_none_of_them(served: Any) -> None:
    assert "toolkit:split" not in httpx.get(f"{served.url}/metrics").text
    assert httpx.get(f"{served.url}/stats").json()["split"] is None


def test_what_the_page_is_told(start: Start) -> None:
    served = start(**FIXED)
    served.ask(max_tokens=9)

    def told() -> Any:
        return httpx.get(f"{served.url}/stats").json()["split"]

    served.until(lambda: any(told()["step_s"]["decode"]["measured"]))
    split = told()
    assert split["layout"] == "1 | 1"
    assert (split["num_units"], split["chunk"]) == (2, None)
    assert split["num_steps"]["decode"] == 8
    assert split["changes"] == [{"at_s": 0.0, "layout": "1 | 1", "why": "1 | 1, as told"}]
    assert len(split["units"]["prefill"]) == len(split["step_s"]["decode"]["predicted"])


@pytest.mark.skipif(BROWSER is None, reason=f"no Chromium (looked for {', '.join(NAMES)})")
def test_the_page_draws_the_split(start: Start, tmp_path: Path) -> None:
    served = start(**FIXED)
    served.ask(n=3, temperature=1.0, max_tokens=9)
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,900",
            "--timeout=3000", "--virtual-time-budget=2500", "--dump-dom", f"{served.url}/",
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    page = done.stdout
    assert "data-error" not in page.split("<body", 1)[0]
    assert "prefill | decode: 1 | 1 of 2 cores" in page
    assert "1 | 1, as told" in page


def test_a_window_of_the_timeline_in_every_form(start: Start, tmp_path: Path) -> None:
    served = start(**FIXED)
    served.ask(max_tokens=9)
    url = f"{served.url}/timeline"
    path = tmp_path / "t.json"
    path.write_text(httpx.get(url).text)
    whole = files.load(path)
    tracks = {(span.track, span.source) for span in whole.spans}
    assert {("layout", "measured"), ("decode", "measured"), ("decode", "predicted")} <= tracks
    page = httpx.get(url, params={"form": "html", "since_s": -60})
    assert page.headers["content-type"].startswith("text/html")
    assert "serving tiny" in page.text
    trace = httpx.get(url, params={"form": "perfetto"})
    assert {"prefill", "decode", "layout"} <= {
        event["args"]["name"].split(" · ")[0]
        for event in json.loads(trace.text)["traceEvents"]
        if event["name"] == "process_name"
    }
    nothing = httpx.get(url, params={"since_s": 1e9}).json()
    assert nothing["body"]["spans"] in ([], {}) or not any(nothing["body"]["spans"])
    assert httpx.get(url, params={"form": "svg"}).status_code == 400


def test_a_window_keeps_what_touches_it() -> None:
    spans = tuple(Span(str(at), "t", at, at + 1.5) for at in range(5))
    whole = Timeline("t", spans, (Counter("c", tuple((float(at), 1.0) for at in range(5))),))
    found = window(whole, 2.0, 3.0)
    assert [span.name for span in found.spans] == ["1", "2", "3"]
    assert found.counters[0].samples == ((2.0, 1.0), (3.0, 1.0))
    assert window(whole, None, None) == whole


# -- faults ---------------------------------------------------------------------------------------


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> list[Phase]:
    """Phases whose next steps raise, one for each entry."""
    coming: list[Phase] = []
    real = phases.compute

    def compute(decoder: Any, cache: Any, batch: Any) -> Any:
        if coming and {piece.phase for piece in batch.slices} == {coming[0]}:
            raise RuntimeError(f"{coming.pop(0).value} fell over")
        return real(decoder, cache, batch)

    monkeypatch.setattr(phases, "compute", compute)
    return coming


@pytest.mark.parametrize("phase", list(Phase))
def test_a_lost_step_costs_nobody_anything(start: Start, faults: list[Phase], phase: Phase) -> None:
    served = start(**FIXED)
    wanted = served.ask().choices[0].text
    faults += [phase, phase]
    assert served.ask().choices[0].text == wanted
    assert served.metric("toolkit:phase_steps_lost_total", phase=phase.value) == 2
    assert served.metric("toolkit:engine_restarts_total") == 0


def test_lost_again_and_again_it_is_a_clear_error_and_the_server_lives(
    start: Start, faults: list[Phase]
) -> None:
    served = start(**FIXED)
    wanted = served.ask().choices[0].text
    faults += [Phase.DECODE] * 3
    with pytest.raises(openai.InternalServerError, match="decode fell over"):
        served.ask()
    assert served.ask().choices[0].text == wanted
    assert served.metric("toolkit:engine_restarts_total") == 1
    assert isinstance(served.service.engine, DividedEngine)
    assert served.metric("toolkit:split_units", phase="decode") == 1
