"""The live page in a real browser, on a server that serves: it draws and no script fails."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)


def test_stats_add_up(served: Any) -> None:
    served.ask(n=2, temperature=1.0, max_tokens=6)
    stats = httpx.get(f"{served.url}/stats").json()
    assert (stats["num_running"], stats["num_waiting"], stats["num_finished"]) == (0, 0, 2)
    assert stats["ttft_s"]["p50"] <= stats["ttft_s"]["p99"]
    assert stats["source"] == "measured"
    assert 0 <= stats["prefix_hit_rate"] <= 1
    assert len({len(values) for values in stats["series"].values()}) == 1
    # The running second is told when it is over.
    served.until(lambda: sum(httpx.get(f"{served.url}/stats").json()["series"]["generated"]) == 12)


@pytest.mark.skipif(BROWSER is None, reason=f"no Chromium (looked for {', '.join(NAMES)})")
def test_the_page_shows_what_is_served(served: Any, tmp_path: Path) -> None:
    served.ask(n=3, temperature=1.0)
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
    assert 'data-shown="3"' in page
    assert ">healthy<" in page
    assert page.count("<polyline") == 5
    assert len(re.findall(r"<dd>", page)) == 9
    assert "http" not in re.sub(r'http://www\.w3\.org/2000/svg|"http-equiv|http-equiv', "", page)
