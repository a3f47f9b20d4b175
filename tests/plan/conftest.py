from __future__ import annotations

import os
from pathlib import Path

import pytest

from toolkit.hardware import find_cluster
from toolkit.plan import subject

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def two_ranks():
    """Two gloo ranks on the generic CPU."""
    return find_cluster("cpux2")


@pytest.fixture(scope="session")
def tiny():
    """gpt-tiny at a small batch, traced once."""
    return subject.load("gpt-tiny", batch=8, tokens=32)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `toy_models:<factory>` importable here and in the ranks that tests start."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
