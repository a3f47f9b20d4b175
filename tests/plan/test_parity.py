"""What is run equals one device, and what is counted equals what was predicted, exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from toolkit.errors import ToolkitError, UsageError
from toolkit.hardware import find_cluster
from toolkit.plan import io, planner, subject, verify


def check(plans, folder: Path, *, dtype: str = "float32") -> list[verify.Report]:
    paths = [folder / f"{index}.json" for index in range(len(plans))]
    for plan, path in zip(plans, paths, strict=True):
        io.save(plan, path)
    reports = verify.verify(paths, dtype=dtype)
    for report in reports:
        assert report.parity.holds, report
        assert report.traffic
        for row in report.traffic:
            assert row.counted == row.predicted, (report.strategy, row)
    return reports


def test_the_corners(toys, two_ranks, tmp_path: Path) -> None:
    """First input without gradient, tied and shared parameters, padding, GQA, recomputation."""
    wanted: dict[str, list[tuple[str, bool]]] = {
        "toy_models:chain": [("tp", False), ("fsdp", False), ("1f1b", False)],
        "toy_models:tied": [("1f1b", False), ("fsdp", True), ("tp", True)],
        "toy_models:uneven": [
            ("dp", True),
            ("zero-1", False),
            ("zero-2", True),
            ("fsdp", False),
            ("1f1b", True),
        ],
        "llama-tiny": [("tp", False)],
    }
    plans = []
    for model, cases in wanted.items():
        traced = subject.load(model, batch=4, **({"tokens": 16} if "llama" in model else {}))
        for strategy, recompute in cases:
            plan = planner.make(traced, two_ranks, strategy, microbatches=2, recompute=recompute)
            plans.append(plan)
    check(plans, tmp_path)


@pytest.mark.slow
def test_a_transformers_llama_unmodified(two_ranks, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256, max_position_embeddings=128,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path / "llama")  # fmt: skip
    traced = subject.load(f"hf:{tmp_path / 'llama'}", batch=4, tokens=16)
    names = ("dp", "zero-1", "fsdp", "tp", "1f1b")
    plans = [planner.make(traced, two_ranks, name, microbatches=2) for name in names]
    check(plans, tmp_path)


def test_a_wrong_prediction_and_a_wrong_plan_are_found(tiny, two_ranks, tmp_path: Path) -> None:
    """The checks can fail: a call too many is reported, and so are gradients nobody reduced."""
    plan = planner.make(tiny, two_ranks, "dp")
    row = plan.prediction.traffic[0]
    wrong = replace(row, count=row.count + 1, num_bytes=row.num_bytes - 1)
    off = replace(plan, prediction=replace(plan.prediction, traffic=(wrong,)))
    unreduced = replace(plan, placements=plan.placements[:-1])
    assert plan.placements[-1].module == ""
    paths = [tmp_path / "off.json", tmp_path / "unreduced.json"]
    for made, path in zip((off, unreduced), paths, strict=True):
        io.save(made, path)
    predicted_wrong, planned_wrong = verify.verify(paths)
    assert predicted_wrong.parity.holds
    assert not predicted_wrong.holds
    assert predicted_wrong.traffic[0].counted == (row.count, row.num_bytes)
    assert not planned_wrong.parity.holds
    assert not planned_wrong.parity.worst_gradient.startswith("blocks.")
    assert planned_wrong.traffic[0].counted[0] == row.count - 1


def test_plans_of_different_sizes_are_not_verified_together(
    tiny, two_ranks, tmp_path: Path
) -> None:
    for index, cluster in enumerate((two_ranks, find_cluster("cpux4"))):
        io.save(planner.make(tiny, cluster, "dp"), tmp_path / f"{index}.json")
    with pytest.raises(UsageError, match="2 and 4 ranks"):
        verify.verify([tmp_path / "0.json", tmp_path / "1.json"])


def test_half_precision_is_not_compared(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="float32 or float64, not in bfloat16"):
        verify.verify([tmp_path / "plan.json"], dtype="bfloat16")


def test_errors_of_a_gradient_are_relative_to_what_matters() -> None:
    import torch

    from toolkit.plan import parity

    noise, zero = torch.full((8,), 1e-9), torch.zeros(8)
    assert parity.error(noise, zero, whole_norm=1.0) < 1e-5
    assert parity.error(torch.full((8,), 1e-3), zero, whole_norm=1.0) > 1
    assert parity.error(torch.full((8,), torch.nan), zero, whole_norm=1.0) == float("inf")


def test_a_communication_op_that_is_not_known_is_an_error() -> None:
    from toolkit.plan.counting import Counter

    with pytest.raises(ToolkitError, match=r"c10d\.scatter_ is not known"):
        Counter()._count("c10d.scatter_", ())
