from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_probed_row(monkeypatch, tmp_path):
    """A row probed on the developer's machine must not decide what these tests see."""
    monkeypatch.setenv("TOOLKIT_PROBE", str(tmp_path / "this.json"))
