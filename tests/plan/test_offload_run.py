"""Plans with something on the host, run on gloo ranks: the same as on one device, and where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from toolkit import record
from toolkit.errors import UsageError
from toolkit.hardware import find_cluster
from toolkit.plan import io, launch, library, planner, verify
from toolkit.plan.lower import host, ladder

HERE = Path(__file__).parent
TRAIN = HERE.parents[1] / "recipes" / "train.py"


def saved(plans, folder: Path) -> list[Path]:
    paths = [folder / f"{number}.json" for number in range(len(plans))]
    for plan, path in zip(plans, paths, strict=True):
        io.save(plan, path)
    return paths


@pytest.mark.parametrize(
    "wanted",
    [
        [("zero-1", "optimizer"), ("fsdp", "parameters"), ("1f1b", "optimizer")],
        pytest.param(
            [(name, "optimizer") for name in ("dp", "zero-2", "fsdp", "tp", "tp-sp", "co-shard")],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["a few", "others"],
)
def test_two_ranks_with_the_host_do_what_one_device_does(
    wanted, tiny, two_ranks, tmp_path: Path
) -> None:
    """Over every rung: loss, gradients and an update; communication as without."""
    plans = [
        planner.make(tiny, two_ranks, strategy, offload=offload, microbatches=2)
        for strategy, offload in wanted
    ]
    for (strategy, offload), report in zip(
        wanted, verify.verify(saved(plans, tmp_path)), strict=True
    ):
        assert report.holds, (strategy, offload, report)
        says = "optimizer on the host" if offload == "optimizer" else "CPUOffloadPolicy"
        assert says in report.rung, report.rung


@pytest.mark.slow
def test_four_ranks_with_the_host_do_what_one_device_does(tiny, tmp_path: Path) -> None:
    """Hybrid sharding, ZeRO over replicas, FSDP2 over tensor, pipelines over data."""
    cluster = find_cluster("cpux4")
    plans = [
        planner.make(tiny, cluster, strategy, offload=offload, microbatches=2)
        for strategy in ("hsdp", "fsdp-tp")
        for offload in ("optimizer", "parameters")
    ]
    hsdp = planner.make(tiny, cluster, "hsdp", offload="optimizer", microbatches=2)
    for how in ("shard_optimizer", "shard_gradients"):
        placements = tuple(replace(entry, how=how) for entry in hsdp.placements)
        plans.append(replace(hsdp, strategy=f"hsdp, {how}", placements=placements))
    plans.append(planner.make(tiny, cluster, "1f1b", offload="optimizer", data=2, microbatches=2))
    plans.append(planner.make(tiny, cluster, "grid", offload="optimizer"))
    from toolkit.plan import predict

    plans = [predict.predict(plan, tiny, cluster) for plan in plans]
    for plan, report in zip(plans, verify.verify(saved(plans, tmp_path)), strict=True):
        assert report.holds, (plan.strategy, plan.offload, report)


def test_states_lie_on_the_host_and_nowhere_else(tiny, two_ranks, tmp_path: Path) -> None:
    """What ranks find of devices and memory; see offload_ranks.py."""
    plans = [
        planner.make(tiny, two_ranks, strategy, offload=offload)
        for strategy, offload in (("zero-1", "optimizer"), ("fsdp", "parameters"))
    ]
    launch.run([str(HERE / "offload_ranks.py"), *map(str, saved(plans, tmp_path))], 2)


def test_copies_of_a_gpu_s_tensors_are_on_the_host() -> None:
    """Of fake tensors: there is no GPU here, and nothing is copied."""
    with FakeTensorMode():
        weight = nn.Parameter(torch.empty(4, device="cuda"))
        assert weight.device.type == "cuda"
        assert host._host_memory(weight).device.type == "cpu"


def test_what_a_rung_does_not_run_is_refused_before_it_starts(tiny, two_ranks) -> None:
    plan = replace(library.find("1f1b")(tiny, two_ranks), offload="parameters")
    with pytest.raises(UsageError, match="parameters on the host are shards"):
        ladder.lower(plan, None, None, None, {})


@pytest.mark.slow
def test_a_run_goes_on_with_and_without_the_host(tiny, two_ranks, tmp_path: Path) -> None:
    """The losses of plans that take turns are those of a run that never stopped."""

    def train(strategy: str, offload: str, folder: Path, steps: int) -> list[float]:
        (path,) = saved([planner.make(tiny, two_ranks, strategy, offload=offload)], folder)
        metrics = folder / "metrics.json"
        launch.run(
            [str(TRAIN), "--plan", str(path), "--steps", str(steps), "--json", str(metrics),
             "--checkpoint", str(folder / "checkpoints"), "--check-parity", "1"],
            2,
        )  # fmt: skip
        body = record.read(metrics, kind="training-metrics", version=1)["body"]
        assert body["parity"][0]["holds"]
        return list(body["losses"])

    (tmp_path / "whole").mkdir()
    whole = train("dp", "none", tmp_path / "whole", 8)
    turns = [
        *train("zero-1", "optimizer", tmp_path, 2),
        *train("fsdp", "parameters", tmp_path, 4),
        *train("fsdp", "optimizer", tmp_path, 6),
        *train("dp", "none", tmp_path, 8),
    ]
    assert turns == pytest.approx(whole, rel=1e-3)
