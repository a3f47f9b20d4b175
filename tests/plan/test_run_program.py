"""The own executor computes what one device does and communicates what was predicted, exactly."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from toolkit.hardware import find_cluster
from toolkit.plan.library import grid

sys.path.append(str(Path(__file__).parent))
from program_check import check


def test_tensor_parallel_and_pipelines_on_two_ranks(tiny, two_ranks) -> None:
    plans = [
        grid.plan(tiny, two_ranks, tensor=2, microbatches=2, recompute=True),
        grid.plan(tiny, two_ranks, tensor=2, sequence=True),
        grid.plan(tiny, two_ranks, pipeline=2, microbatches=4, recompute=True),
        grid.plan(tiny, two_ranks, microbatches=2),
    ]
    for found in check(plans, tiny):
        assert found["parity"]["num_gradients"] == 69
        assert found["rung"] == "program: own executor"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_grids_of_four(tiny, dtype: str) -> None:
    cluster = find_cluster("cpux4")
    plans = [
        grid.plan(tiny, cluster, pipeline=2, tensor=2, microbatches=4, sequence=True),
        grid.plan(tiny, cluster, tensor=2, microbatches=2, recompute=True),
        grid.plan(tiny, cluster, pipeline=4, microbatches=4),
        grid.plan(tiny, cluster, pipeline=2, microbatches=2),
        grid.plan(tiny, cluster, pipeline=2, context=2, microbatches=2),
        grid.plan(tiny, cluster, tensor=2, context=2, microbatches=2),
    ]
    check(plans, tiny, dtype=dtype)
