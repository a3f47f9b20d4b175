"""A run under one pipeline goes on under another plan, from the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit import record
from toolkit.hardware import find_cluster
from toolkit.plan import io, launch, planner

TRAIN = Path(__file__).parents[2] / "recipes" / "train.py"


def train(plan, folder: Path, steps: int, *options: str) -> dict:
    path, metrics = folder / "plan.json", folder / "metrics.json"
    io.save(plan, path)
    launch.run(
        [str(TRAIN), "--plan", str(path), "--steps", str(steps), "--json", str(metrics),
         "--checkpoint", str(folder / "checkpoints"), *options],
        plan.num_ranks,
    )  # fmt: skip
    return record.read(metrics, kind="training-metrics", version=1)["body"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [("interleaved", "fsdp"), ("zb-v", "dp"), ("zero-1", "dualpipe-v")]
)
def test_a_pipeline_is_resumed_under_another_plan(
    before: str, after: str, tiny, tmp_path: Path
) -> None:
    """Parameters and moments alike: the losses are those of a run that never stopped."""
    cluster = find_cluster("cpux2")
    counts = {"zb-v": 2, "dualpipe-v": 4}
    (tmp_path / "whole").mkdir()
    whole = train(planner.make(tiny, cluster, "dp"), tmp_path / "whole", 6)["losses"]
    one = planner.make(tiny, cluster, before, microbatches=counts.get(before))
    other = planner.make(tiny, cluster, after, microbatches=counts.get(after))
    first = train(one, tmp_path, 3)["losses"]
    second = train(other, tmp_path, 6, "--check-parity", "1")
    assert second["first_step"] == 3
    assert second["parity"][0]["holds"]
    assert first + second["losses"] == pytest.approx(whole, rel=1e-3)
