"""Clusters by name and from files: sizes, places, paths, and the errors of wrong ones."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import FormatError, UsageError
from toolkit.hardware import Cluster, catalogue, find_cluster
from toolkit.hardware.cluster import Group, Level

ROWS = catalogue.builtin()
DEVICES = [name for name, machine in ROWS.machine_of.items() if machine != "cpu-host"]


@given(
    st.sampled_from(sorted([*DEVICES, *ROWS.aliases])),
    st.integers(1, 300),
    st.integers(1, 8),
    st.booleans(),
)
def test_composed_names_have_the_size_they_say(base, nodes, devices, upper):
    name = f"{nodes}x{base}x{devices}"
    cluster = find_cluster(name.upper() if upper else name)
    assert cluster.num_nodes == nodes
    assert cluster.num_devices == nodes * devices
    last = cluster.place(cluster.num_devices - 1)
    assert (last.node_index, last.local) == (nodes - 1, devices - 1)


@given(
    st.lists(
        st.tuples(st.sampled_from(DEVICES), st.integers(1, 5), st.integers(1, 8)),
        min_size=1, max_size=4,
    )
)  # fmt: skip
def test_joined_names_count_ranks_machine_by_machine(parts):
    cluster = find_cluster("+".join(f"{n}x{name}x{size}" for name, n, size in parts))
    expected = [name for name, n, size in parts for _ in range(n * size)]
    assert [cluster.device(rank).name for rank in cluster.ranks] == expected
    places = [cluster.place(rank) for rank in cluster.ranks]
    assert [place.node_index for place in places] == sorted(place.node_index for place in places)
    assert cluster.is_homogeneous == (len(set(expected)) == 1)


@pytest.mark.parametrize(
    ("name", "devices", "nodes"),
    [
        ("h100x8", 8, 1), ("16xdgx2", 256, 16), ("4xh100x8", 32, 4), ("cpux2", 2, 1),
        ("h100", 1, 1), ("dgx1", 8, 1), ("mi300x8", 8, 1), ("mi300xx4", 4, 1), ("mi300x", 1, 1),
        ("rtx-4090x2", 2, 1), ("rtx4090", 1, 1), ("2x4090x4", 8, 2), ("generic-cpux4", 4, 1),
    ],
)  # fmt: skip
def test_names(name, devices, nodes):
    cluster = find_cluster(name)
    assert (cluster.num_devices, cluster.num_nodes) == (devices, nodes)


def test_cpu_ranks_divide_the_machine():
    whole = find_cluster("generic-cpu").device(0)
    part = find_cluster("generic-cpux4").device(0)
    assert part.peak("float32") == whole.peak("float32") / 4
    assert part.memory_bytes == whole.memory_bytes // 4
    assert part.memory_bandwidth == whole.memory_bandwidth / 4
    assert part.num_units == 2
    # More ranks than cores: a core each, part of the time.
    crowded = find_cluster("generic-cpux16").device(0)
    assert crowded.num_units == 1
    assert crowded.peak("float32") == pytest.approx(whole.peak("float32") / 16)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("h10x8", "did you mean 'h100'"),
        ("4xdgx3", "did you mean 'dgx"),
        ("h100x9", "one dgx-h100 holds 8 h100-sxm, not 9; write 2xh100-sxmx8"),
        ("0xh100x8", "at least 1"),
        ("h100x0", "at least 1"),
        ("", "unknown machine or device ''"),
        ("h100x8+", "unknown machine or device ''"),
        ("thisx2", "has not been probed"),
    ],
)
def test_wrong_names(name, says):
    with pytest.raises(UsageError, match=says):
        find_cluster(name)


def test_ranks_outside_are_errors():
    cluster = find_cluster("2xh100x8")
    for rank in (-1, 16):
        with pytest.raises(UsageError, match="its ranks are 0 to 15"):
            cluster.place(rank)


def test_paths_inside_and_between_machines():
    cluster = find_cluster("dgx-h100+dgx-a100")
    assert cluster.path(0, 7).name == "nvswitch-h100"
    assert cluster.path(8, 15).name == "nvswitch-a100"
    between = cluster.path(0, 8)
    assert between.name == "infiniband-hdr"  # the slower of the two sides
    assert between.effective_bandwidth < cluster.path(8, 15).effective_bandwidth


def test_thousand_devices_are_cheap():
    cluster = find_cluster("128xh100x8")
    assert sum(place.local for place in map(cluster.place, cluster.ranks)) == 128 * 28
    assert len(cluster.by_node(cluster.ranks)) == 128
    assert len(pickle.dumps(cluster)) < 20_000  # a row for the machine, not one for every pair


MIXED = """
name = "mixed"

[[nodes]]
machine = "dgx-h100"
count = 2

[[nodes]]
machine = "2xa100x4"

[[nodes]]
machine = "box"

[[network]]
name = "leaf"
num_nodes = 2
latency_s = 1e-6

[[network]]
name = "spine"
latency_s = 3e-6
oversubscription = 2.0

[devices.npu]
kind = "cuda"
memory_gib = 64
memory_bandwidth = 2e12
peak_flops = { float32 = 20e12, bfloat16 = 200e12 }
num_units = 64
unit_granularity = [2, 2]
launch_overhead_s = 5e-6
source = "the vendor's sheet"

[links.wire]
bandwidth = 100e9
latency_s = 2e-6

[machines.box]
device = "npu"
num_devices = 4
topology = "mesh"
link = "wire"
nic = "ethernet-100g"
num_nics = 2
source = "our rack"
"""


def test_heterogeneous_file(tmp_path):
    path = tmp_path / "mixed.toml"
    path.write_text(MIXED)
    cluster = find_cluster(str(path))
    assert (cluster.name, cluster.num_devices, cluster.num_nodes) == ("mixed", 28, 5)
    assert [cluster.device(rank).name for rank in (0, 16, 27)] == ["h100-sxm", "a100-80g", "npu"]
    assert not cluster.is_homogeneous
    near, far = cluster.path(0, 8), cluster.path(0, 16)
    assert cluster.level((0, 1)).name == "leaf"
    assert cluster.level((0, 4)).name == "spine"
    assert near.latency_s < far.latency_s
    assert far.bandwidth == ROWS.link("infiniband-hdr").bandwidth / 2
    # What a file defines stays in the file.
    with pytest.raises(UsageError):
        find_cluster("npu")


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (("num_devices = 4", "num_device = 4"), UsageError, "did you mean 'num_devices'"),
        (('machine = "box"', 'machine = "bux"'), UsageError, "did you mean 'box'"),
        (('device = "npu"', 'device = "nqu"'), UsageError, "unknown device 'nqu'"),
        (("float32 = 20e12", "float23 = 20e12"), UsageError, "peak_flops needs float32"),
        (('topology = "mesh"', 'topology = "mush"'), UsageError, "use one of: switch, mesh"),
        (("bandwidth = 100e9", "bandwidth = -1"), UsageError, "bandwidth > 0"),
        (("num_nodes = 2\n", ""), UsageError, "network levels need growing num_nodes"),
        (('nic = "ethernet-100g"\nnum_nics = 2', ""), UsageError, "has no nic"),
        (("[devices.npu]", "[devices.h100]"), UsageError, "the name 'h100' is taken"),
        (('name = "mixed"', "name = "), FormatError, "not valid TOML"),
        (("count = 2", 'count = "two"'), UsageError, "count"),
    ],
)  # fmt: skip
def test_wrong_files(tmp_path, change, error, says):
    path = tmp_path / "wrong.toml"
    assert change[0] in MIXED
    path.write_text(MIXED.replace(*change))
    with pytest.raises(error, match=says):
        find_cluster(str(path))


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        find_cluster(str(tmp_path / "none.toml"))


def test_levels_are_checked():
    node = ROWS.machine("dgx-h100")
    with pytest.raises(UsageError, match="oversubscription >= 1"):
        Level(oversubscription=0.5)
    with pytest.raises(UsageError, match="growing"):
        Cluster("c", (Group(node, 4),), (Level(num_nodes=2), Level(num_nodes=2), Level()))


def test_the_file_in_the_documentation_works(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "howto" / "add-a-device.md"
    path = tmp_path / "lab.toml"
    path.write_text(page.read_text().split("```toml\n")[1].split("```")[0])
    assert find_cluster(str(path)).num_devices == 20
