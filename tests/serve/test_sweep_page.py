"""The page of a sweep: every run in it, the paper's figures beside, and no network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from toolkit.cli import main
from toolkit.serve.simulate import curves, page, published

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)


def run_of(system: str, rate: float | None, scale: float = 1.0) -> dict[str, Any]:
    spread = {name: scale * (index + 1) for index, name in enumerate(("mean", "p50", "p95", "p99"))}
    return {
        "system": system, "rate": rate, "num_requests": 5, "output_tokens_per_s": 100 / scale,
        "requests_per_s": 1.0, "ttft_s": spread, "tbt_s": spread, "e2e_s": spread,
        "normalised_s": spread,
    }  # fmt: skip


@pytest.fixture
def body() -> dict[str, Any]:
    runs = [run_of("chunked", rate, 2.0) for rate in (1.0, 2.0)]
    runs += [run_of("split-spf", 1.0, 1.0), run_of("split-spf", 2.0, 0.5)]
    runs += [run_of("auto", rate, 1.0) for rate in (1.0, None)]
    return {
        "model": "m<1>", "device": "l20", "num_devices": 1, "workload": "mixed",
        "dtype": "bfloat16", "seed": 0, "kv_tokens": 1000, "source": "simulated", "runs": runs,
    }  # fmt: skip


def test_ratios_are_those_of_the_runs(body) -> None:
    rows = {row[0]: row[1:] for row in published.beside(body)}
    assert rows["TBT, mean, over vLLM"] == ("1.24 to 1.48", "2.00 to 4.00", "2.00")
    assert rows["throughput over vLLM"] == ("1.9", "4.00", "2.00")
    assert "throughput over SGLang" not in rows
    assert published.beside(body | {"workload": "azure-conv"}) == []
    two = {row[0]: row[1] for row in published.beside(body | {"num_devices": 2})}
    assert two["throughput over vLLM"] == "2.2"


def test_the_page_holds_everything_and_loads_nothing(body) -> None:
    text = page.render(body)
    assert text.count("<svg") == 12
    assert "m&lt;1&gt; on l20" in text
    assert "<b>simulated</b>" in text
    assert not re.search(r"(src|href)\s*=|https?://", text)
    assert "at once" in text


def test_a_line_is_drawn_where_it_belongs() -> None:
    drawn = curves.chart("t", {"a": [(1, 1.0), (2, 100.0)]}, places={"a": 0}, unit="s", across="x")
    points = re.search(r'points="([^"]+)"', drawn)
    assert points is not None
    (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points[1].split())
    assert x1 < x2
    assert y1 > y2
    assert curves.chart("t", {"a": []}, places={"a": 0}, unit="s", across="x") == ""


def test_the_command_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "sweep.html"
    arguments = ["serve", "simulate", "llama-tiny", "--device", "l4", "--workload", "mixed"]
    arguments += ["--num", "4", "--rate", "2,4", "--report", str(file), "--json"]
    result = CliRunner().invoke(main.app, arguments)
    assert result.exit_code == 0, result.output
    assert file.read_text("utf-8") == page.render(json.loads(result.stdout))


@pytest.mark.skipif(BROWSER is None, reason=f"no Chromium here (looked for {', '.join(NAMES)})")
def test_a_browser_hides_a_system_that_is_unticked(body, tmp_path: Path) -> None:
    assert BROWSER is not None
    check = (
        "<script>const box = document.querySelector('input[value=auto]'); box.click();"
        "document.documentElement.dataset.off ="
        " document.querySelectorAll('[data-name=auto].off').length + '/' +"
        " document.querySelectorAll('[data-name=auto]').length;</script>"
    )
    file = tmp_path / "page.html"
    file.write_text(page.render(body) + check, "utf-8")
    arguments = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    arguments += [f"--user-data-dir={tmp_path / 'profile'}", file.as_uri()]
    dom = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True).stdout
    hidden, there = re.search(r'data-off="(\d+)/(\d+)"', dom).groups()  # type: ignore[union-attr]
    assert hidden == there != "0"
