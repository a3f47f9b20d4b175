"""The ground is what every command loads first, so what it imports is what help costs."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "scipy", "networkx", "pydantic", "transformers")
GROUND = (
    "toolkit", "toolkit.errors", "toolkit.units", "toolkit.config", "toolkit.log",
    "toolkit.record", "toolkit.timeline", "toolkit.hardware.affinity",
)  # fmt: skip


@pytest.mark.parametrize("module", GROUND)
def test_the_ground_imports_nothing_heavy(module):
    code = f"import {module}, sys; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == []
