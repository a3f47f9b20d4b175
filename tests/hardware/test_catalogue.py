"""Every row of the catalogue is valid, sourced, and consistent with the others."""

from __future__ import annotations

import pytest

from toolkit.errors import UsageError
from toolkit.hardware import catalogue, find_cluster, find_device
from toolkit.hardware.device import canonical_dtype
from toolkit.units import GIB

ROWS = catalogue.builtin()


@pytest.mark.parametrize("name", sorted(ROWS.devices))
def test_device_row(name):
    device = ROWS.device(name)
    assert len(device.source) > 20
    assert not device.measured
    assert 1 * GIB <= device.memory_bytes <= 512 * GIB
    assert 1e9 < device.memory_bandwidth < 2e13
    if device.kind != "cpu":
        # Narrower matrix types are never slower, and datasheets' sparse figures are not in.
        ladder = [device.peak_flops.get(t) for t in ("float32", "tf32", "float16", "float8")]
        known = [rate for rate in ladder if rate]
        assert known == sorted(known)
        if "tf32" in device.peak_flops:
            assert device.peak("float16") <= 2.1 * device.peak("tf32")
        if "float8" in device.peak_flops:
            assert device.peak("float8") == pytest.approx(2 * device.peak("float16"), rel=0.02)
        assert device.num_units >= 58
        assert device.pcie_generation in (3, 4, 5)
        nominal = {3: 15.8e9, 4: 31.5e9, 5: 63e9}[device.pcie_generation]
        assert 0.7 * nominal < device.host_bandwidth < nominal


@pytest.mark.parametrize(
    ("name", "granularity"),
    [("v100", (2, 2)), ("a100", (4, 2)), ("l20", (4, 2)), ("h100", (8, 8)), ("h200", (8, 8))],
)
def test_green_context_granularity_follows_compute_capability(name, granularity):
    assert find_device(name).unit_granularity == granularity


@pytest.mark.parametrize("name", sorted(ROWS.machines))
def test_machine_row(name):
    node = ROWS.machine(name)
    assert len(node.source) > 10
    assert node.link.source
    assert node.nic is not None
    assert node.graph().number_of_nodes() >= node.num_devices
    whole = node.among(tuple(range(node.num_devices)))
    assert whole.effective_bandwidth > 0


@pytest.mark.parametrize("name", sorted(ROWS.links))
def test_link_row(name):
    assert ROWS.link(name).source


@pytest.mark.parametrize("name", sorted(ROWS.machine_of))
def test_a_device_implies_a_machine_of_that_device(name):
    assert ROWS.machine(name).device is ROWS.device(name)


def test_required_rows_are_there():
    for name in (
        "v100-32g", "a100-40g", "a100-80g", "h100-sxm", "h200", "l4", "l20", "rtx-4090", "mi300x",
        "generic-cpu",
    ):  # fmt: skip
        assert find_device(name).name == name
    assert find_device("h100") is find_device("h100-sxm")


def test_dgx1_is_the_hybrid_cube_mesh():
    node = ROWS.machine("dgx1")
    degree = dict.fromkeys(range(8), 0)
    for first, second, count in node.wires:
        degree[first] += count
        degree[second] += count
    assert set(degree.values()) == {6}  # six NVLinks a GPU
    one = node.link.effective_bandwidth
    assert node.among(tuple(range(8))).effective_bandwidth == pytest.approx(6 * one)
    assert node.path(0, 3).effective_bandwidth == pytest.approx(2 * one)
    assert node.path(0, 1).effective_bandwidth == pytest.approx(one)
    # No wire between 0 and 5: over the host.
    assert node.path(0, 5) is node.host_link
    assert node.among((0, 5)) is node.host_link


def test_mesh_bandwidth_grows_with_the_ranks_that_take_part():
    node = ROWS.machine("mi300x")
    one = node.link.effective_bandwidth
    for n in (2, 4, 8):
        devices = tuple(range(n))
        assert node.among(devices).effective_bandwidth == pytest.approx((n - 1) * one)


@pytest.mark.parametrize(
    ("name", "says"),
    [("h10", "h100"), ("mi30x", "mi300x"), ("a100-90g", "a100-80g"), ("thiss", "this")],
)
def test_unknown_device_names_the_nearest(name, says):
    with pytest.raises(UsageError, match=f"did you mean .*{says}"):
        find_device(name)


def test_a_missing_dtype_is_an_error_not_a_guess():
    with pytest.raises(UsageError, match=r"v100-32g has no bfloat16 peak; it has: .*float16"):
        find_device("v100").peak("bf16")
    assert canonical_dtype("torch.float8_e4m3fn") == "float8"


def test_every_machine_composes():
    for name in (*ROWS.machines, *ROWS.devices, *ROWS.aliases):
        assert find_cluster(name).num_devices >= 1
