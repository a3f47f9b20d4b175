"""The probe: a faked machine for the whole path, small real measurements, and its failures."""

from __future__ import annotations

import json
import sys
import types

import pytest

from toolkit import record
from toolkit.cost import collective
from toolkit.errors import FormatError, UsageError
from toolkit.hardware import affinity, find_cluster, find_device, measured, probe
from toolkit.hardware.probe import accelerator, collectives, disk, gemm, memory, timing
from toolkit.units import KIB, MIB


def fake_result() -> probe.Result:
    """What a probe of this machine could have found, with a float16 GEMM that failed."""
    rows = [
        {
            "num_threads": count,
            "gemm_flops": {"float32": 90e9 * count, "float16": None, "int8": 200e9 * count},
            "memory_bandwidth": 15e9 + 10e9 * (count - 1),
        }
        for count in (1, 2)
    ]
    read = {
        "num_bytes": MIB, "pattern": "random", "num_readers": 4,
        "bandwidth": 0.9e9, "median_latency_s": 1e-3,
    }  # fmt: skip
    points = [(4096, 1.1e-4), (2**20, 1.15e-3), (2**24, 1.69e-2)]
    return probe.Result(
        {
            "fingerprint": vars(measured.Fingerprint.here()),
            "probed_at": "2026-01-01T00:00:00+00:00",
            "quick": True,
            "load_average": 0.0,
            "memory_bytes": 8 * 2**30,
            "op_overhead_s": 1e-6,
            "threads": rows,
            "disk": {"folder": "/x", "file_bytes": MIB, "reads": [read], "write_bandwidth": 2e8},
            "collectives": [collectives.fit("all_reduce", 2, points)],
            "collective_points": {"2": {"all_reduce": points}},
            "accelerators": [],
        },
        {"float16 GEMM, 1 threads": "RuntimeError: no kernel"},
    )


def test_a_written_row_is_what_this_and_cpu_then_mean():
    assert find_device("cpu").name == "generic-cpu"
    with pytest.raises(UsageError, match="has not been probed; run `toolkit hardware probe`"):
        find_device("this")
    fake_result().write(measured.default_path())
    device = find_device("this")
    assert device == find_device("cpu")
    assert device.measured
    assert device.peak("float32") == 180e9
    assert device.memory_bandwidth == 25e9
    assert device.disk.read_bandwidth(MIB, num_readers=4) == 0.9e9
    assert device.disk.read_bandwidth(MIB) is None
    with pytest.raises(UsageError, match="this has no float16 peak"):  # not measured, so no number
        device.peak("float16")

    cluster = find_cluster("cpux2")
    rank = cluster.device(0)
    assert rank.peak("float32") == 90e9
    assert rank.memory_bandwidth == 12.5e9  # both ranks read at once
    cost = collective.cost("all_reduce", 2**20, cluster.ranks, cluster)
    assert cost.algorithm == "measured"
    assert cost.seconds == pytest.approx(1.15e-3, rel=0.05)
    ring = collective.cost("all_reduce", 2**20, cluster.ranks, cluster, algorithm="ring")
    assert ring.seconds == pytest.approx(cost.seconds)  # the link is fitted to the same line


def test_a_row_of_another_machine_is_not_used():
    result = fake_result()
    result.body["fingerprint"] = {"processor": "abacus", "num_cores": 1}
    result.write(measured.default_path())
    assert find_device("cpu").name == "generic-cpu"
    with pytest.raises(UsageError, match=r"was probed on .*abacus"):
        find_device("this")


def test_rows_elsewhere_are_read_by_path(tmp_path):
    path = tmp_path / "row.json"
    fake_result().write(path)
    assert find_device(str(path)).peak("int8") == 400e9


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (lambda body: body.pop("threads"), FormatError, "not a whole hardware probe"),
        (lambda body: body["threads"].clear(), FormatError, "no thread count has both"),
        (lambda body: body["collectives"][0].pop("kind"), FormatError, "not a whole"),
    ],
)
def test_incomplete_rows(damage, error, says):
    result = fake_result()
    damage(result.body)
    result.write(measured.default_path())
    with pytest.raises(error, match=says):
        find_device("this")


def test_torn_rows():
    path = measured.default_path()
    fake_result().write(path)
    path.write_text(path.read_text()[:-200])
    with pytest.raises(FormatError, match="corrupt"):
        find_device("cpu")


def test_a_failing_part_is_named_and_leaves_no_number(monkeypatch, tmp_path):
    """Everything that can fail fails: the probe still ends, with reasons and without figures."""

    def broken(*args, **settings):
        raise RuntimeError("no such kernel\nand a trace")

    monkeypatch.setattr(gemm, "flops", broken)
    monkeypatch.setattr(gemm, "op_overhead_s", broken)
    monkeypatch.setattr(memory, "read_bandwidth", broken)
    monkeypatch.setattr(disk, "measure", broken)
    monkeypatch.setattr(collectives, "measure", broken)
    monkeypatch.setattr(accelerator, "measure", broken)
    seen = []
    result = probe.run(probe.Options.of(quick=True), on_part=lambda *step: seen.append(step))
    assert seen[-1][0] == seen[-1][1] == len(seen) - 1
    assert "RuntimeError: no such kernel" in result.not_measured.values()
    for row in result.body["threads"]:
        assert set(row["gemm_flops"].values()) == {None}
        assert row["memory_bandwidth"] is None
    assert result.body["collectives"] == []
    assert result.body["disk"] is None
    result.write(tmp_path / "row.json")
    stored = record.read(tmp_path / "row.json", kind="hardware-probe", version=1)["body"]
    assert "disk" in stored["not_measured"]
    with pytest.raises(FormatError, match="no thread count"):
        find_device(str(tmp_path / "row.json"))


def test_thread_setting_is_restored(monkeypatch):
    import torch

    monkeypatch.setattr(gemm, "flops", lambda *a, **s: float(torch.get_num_threads()))
    monkeypatch.setattr(memory, "read_bandwidth", lambda *a, **s: 1.0)
    monkeypatch.setattr(disk, "measure", lambda *a, **s: None)
    monkeypatch.setattr(collectives, "measure", lambda *a, **s: {"points": {}, "failed": {}})
    before = torch.get_num_threads()
    result = probe.run(probe.Options.of(quick=True))
    assert torch.get_num_threads() == before
    counts = [row["num_threads"] for row in result.body["threads"]]
    assert counts[-1] == affinity.usable_cores()
    for row in result.body["threads"]:
        assert row["gemm_flops"]["float32"] == row["num_threads"]


def test_small_real_measurements():
    assert gemm.flops("float32", (64,), budget_s=0.01) > 1e6
    assert memory.read_bandwidth(4 * MIB, budget_s=0.01) > 1e6
    assert 1e-8 < gemm.op_overhead_s(budget_s=0.01) < 1e-2
    assert memory.total_bytes() > 2**28
    assert memory.array_bytes(quick=True) >= 16 * MIB


def test_durations_repeat_and_warm_up():
    calls = []
    found = timing.durations(lambda: calls.append(1), budget_s=0.0, min_repeats=3)
    assert (len(found), len(calls)) == (3, 4)


def test_disk_measures_what_it_wrote_and_cleans_up(tmp_path):
    try:
        found = disk.measure(tmp_path, file_bytes=4 * MIB, budget_s=0.1, readers=(1, 2))
    except OSError as error:
        pytest.skip(f"this file system has no direct reads: {error}")
    finally:
        assert list(tmp_path.iterdir()) == []
    assert found["write_bandwidth"] > 0
    kinds = {(row["pattern"], row["num_bytes"], row["num_readers"]) for row in found["reads"]}
    assert ("random", 256 * KIB, 2) in kinds
    assert ("sequential", MIB, 1) in kinds
    assert all(row["bandwidth"] > 0 for row in found["reads"])


def test_a_full_disk_is_refused(tmp_path):
    with pytest.raises(OSError, match="less than four times the test file"):
        disk.measure(tmp_path, file_bytes=2**60, budget_s=0.1, readers=(1,))


def test_two_real_ranks():
    found = collectives.measure(2, (4 * KIB, 64 * KIB), budget_s=0.1, timeout_s=90)
    assert found["failed"] == {}
    assert set(found["points"]) == set(collectives.KINDS)
    for kind, points in found["points"].items():
        assert [size for size, _ in points] == [4 * KIB, 64 * KIB]
        fit = collectives.fit(kind, 2, points)
        assert fit["latency_s"] >= 0
        assert fit["bandwidth"] > 0


@pytest.mark.parametrize(
    ("body", "says"),
    [("exec sleep 60", "rank 0 was not done after 0 s"), ("echo no gloo >&2; exit 3", "no gloo")],
)
def test_hung_and_failing_ranks_are_stopped(monkeypatch, tmp_path, body, says):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{body}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RuntimeError, match=says):
        collectives.measure(2, (4 * KIB,), budget_s=0.1, timeout_s=0.3)


def test_fit_reports_how_far_the_line_is_off():
    bent = [(1e3, 1e-4), (1e6, 5e-3), (1e7, 1e-2)]
    assert collectives.fit("send", 2, bent)["max_error"] > 0.1


def test_a_fake_gpu_fills_a_row(monkeypatch):
    """The CUDA part against a stand-in for torch.cuda: it has not run on hardware."""
    import torch

    properties = types.SimpleNamespace(
        name="Fake GPU", total_memory=24 * 2**30, multi_processor_count=64, L2_cache_size=2**25,
        major=8, minor=9,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "device", lambda kind, index: "cpu")
    monkeypatch.setattr(accelerator, "GEMM_SIZE", 32)
    monkeypatch.setattr(accelerator, "COPY_BYTES", MIB)
    result = fake_result()
    result.body["accelerators"] = accelerator.measure(budget_s=0.05)
    result.write(measured.default_path())
    device = find_device("this:0")
    assert (device.kind, device.num_units, device.unit_granularity) == ("cuda", 64, (4, 2))
    assert "not yet tried on hardware" in device.source
    with pytest.raises(UsageError, match="found 1 accelerators, none with number 1"):
        find_device("this:1")


def test_quick_probe_of_this_machine(tmp_path):
    result = probe.run(probe.Options.of(quick=True, disk_folder=tmp_path))
    result.write(measured.default_path())
    device = find_device("this")
    assert device.num_units == affinity.usable_cores()
    assert json.loads(measured.default_path().read_text())["version"] == 1
