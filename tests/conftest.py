"""What every test may ask for: real weights, fetched once into the model cache."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Before torch is imported anywhere: with more threads than cores it collapses, and a sum split
# over another number of threads is another sum.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A row probed on this machine, perhaps while tests kept it busy, must not decide what they see.
os.environ.setdefault("TOOLKIT_PROBE", str(Path(tempfile.gettempdir()) / "toolkit-unprobed.json"))
# xdist hands its workers a terminal's width; commands are tested as without a terminal.
os.environ.pop("COLUMNS", None)

import pytest
from hypothesis import HealthCheck, settings

from toolkit.errors import ToolkitError

# A machine that is busy draws slowly: that is no property of what is tested.
settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")


def pytest_xdist_auto_num_workers() -> int:
    """A worker a core that may be used: affinity and quota heeded, which xdist does not."""
    from toolkit.hardware.affinity import usable_cores

    return usable_cores()


def _weights(name: str) -> Path:
    from toolkit.models import weights

    try:
        return weights.get(name)
    except ToolkitError as error:
        pytest.skip(f"{name} is not cached and cannot be fetched: {error}")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    return _weights("smollm2-135m")


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """The Hugging Face folder of all-MiniLM-L6-v2."""
    return _weights("minilm-l6")
