import os

import pytest

from toolkit.hardware import affinity


@pytest.mark.parametrize(
    ("text", "cores"),
    [("150000 100000\n", 1.5), ("max 100000\n", None), ("", None), ("nonsense", None)],
)
def test_the_quota_of_a_control_group(text, cores, tmp_path):
    (tmp_path / "cpu.max").write_text(text)
    assert affinity.cgroup_quota(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [("200000", 2.0), ("-1", None), ("0", None)])
def test_the_quota_of_an_older_control_group(quota, cores, tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert affinity.cgroup_quota(tmp_path) == cores


def test_no_control_group_is_no_quota(tmp_path):
    assert affinity.cgroup_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("mask", "quota", "cores"),
    [({0, 1, 2, 3}, None, 4), ({0, 1, 2, 3}, 2.9, 2), ({0}, 8.0, 1), ({0, 1}, 0.5, 1)],
)
def test_cores_are_the_mask_capped_by_the_quota(mask, quota, cores, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: mask)
    monkeypatch.setattr(affinity, "cgroup_quota", lambda: quota)
    assert affinity.usable_cores() == cores


def test_cpus_of_the_mask_come_in_order(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 1, 3})
    assert affinity.usable_cpus() == (1, 3, 5)


def test_a_child_gets_the_same_count_in_every_library():
    environment = affinity.thread_environment(3)
    counts = {value for name, value in environment.items() if name.endswith("_NUM_THREADS")}
    assert counts == {"3"}
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert affinity.thread_environment(0)["OMP_NUM_THREADS"] == "1"
