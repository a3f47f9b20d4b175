"""Make clusters from names (`4xh100x8`, `dgx2+2xa100x8`, `cpux2`) and from TOML files."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from toolkit import config
from toolkit.errors import FormatError, UsageError, unknown_name
from toolkit.hardware import catalogue as catalogue_
from toolkit.hardware import measured
from toolkit.hardware.catalogue import Catalogue
from toolkit.hardware.cluster import Cluster, Group, Level
from toolkit.hardware.device import Device
from toolkit.hardware.node import Node

_COUNTED = re.compile(r"(\d+)x(.+)")


def find_device(name: str) -> Device:
    """Return a device by catalogue name or alias, or a probed row's file (`row.json`).

    "this" is this machine's probed row, "this:0" its first probed GPU; "cpu" is the probed row
    when there is one, else "generic-cpu". Raises UsageError naming the nearest match.
    """
    if name.endswith(".json"):
        return measured.load(Path(name)).device
    name = name.lower()
    if name in catalogue_.THIS:
        return _this(name).device
    if name.startswith("this:") and name[5:].isdigit():
        return measured.accelerator(measured.default_path(), int(name[5:]))
    known = catalogue_.builtin()
    if name not in known.devices and name not in known.aliases:
        raise unknown_name("device", name, {*catalogue_.device_names(known), *catalogue_.THIS})
    return known.device(name)


def _this(name: str) -> Node:
    """The machine behind "this" and "cpu"."""
    found = measured.this_machine(required=name == "this")
    if found is not None:
        return found
    return catalogue_.builtin().machine("generic-cpu")


def find_cluster(name: str) -> Cluster:
    """Return a cluster by name, or from a `.toml` file.

    `h100x8`: 8 of a device in one machine; `16xdgx2`: 16 machines; `4xh100x8`: 4 machines of 8;
    `h100`: one device; `dgx2`: one machine; `cpux2`: two ranks on this CPU; `A+B` joins. Raises
    UsageError naming the nearest match.

    >>> find_cluster("4xh100x8").num_devices
    32
    """
    if name.endswith(".toml"):
        return read(Path(name))
    return Cluster(name, tuple(_group(part, name) for part in name.split("+")))


def _group(part: str, name: str, catalogue: Catalogue | None = None) -> Group:
    """Read `[COUNTx]MACHINE[xDEVICES]`."""
    rows = catalogue or catalogue_.builtin()
    known = {*catalogue_.names(rows), *rows.machine_of, *catalogue_.THIS}
    part = part.strip().lower()
    count, base = 1, part
    counted = _COUNTED.fullmatch(part)
    if counted and part not in known:
        count, base = int(counted[1]), counted[2]
    size: int | None = None
    if base not in known:
        stem, cross, digits = base.rpartition("x")
        if cross and digits.isdigit() and stem:
            base, size = stem, int(digits)
    if count < 1 or size == 0:
        raise UsageError(f"cluster {name!r}: counts must be at least 1")
    if base in catalogue_.THIS or base == "generic-cpu":
        whole = _this(base) if base in catalogue_.THIS else rows.machine(base)
        return Group(share_cpu(whole, size or 1), count)
    node = rows.machine(base)
    is_device = rows.aliases.get(base, base) in rows.devices
    if size is None:
        size = 1 if is_device else node.num_devices
    return Group(part_of(node, size, name), count)


def part_of(node: Node, num_devices: int, name: str) -> Node:
    """Return the machine with only its first `num_devices`, and their part of its ports."""
    if num_devices == node.num_devices:
        return node
    if num_devices > node.num_devices:
        nodes = -(-num_devices // node.num_devices)
        raise UsageError(
            f"cluster {name!r}: one {node.name} holds {node.num_devices} {node.device.name}, "
            f"not {num_devices}",
            remedy=f"write {nodes}x{node.device.name}x{node.num_devices} for {nodes} machines",
        )
    wires = tuple(wire for wire in node.wires if max(wire[:2]) < num_devices)
    return replace(
        node,
        num_devices=num_devices,
        wires=wires,
        # A single device of a wired machine keeps no wire.
        topology=node.topology if wires or node.topology != "wires" else "switch",
        num_nics=max(1, node.num_nics * num_devices // node.num_devices) if node.nic else 0,
        host=_part_of_host(node.host, num_devices / node.num_devices) if node.host else None,
    )


def _part_of_host(host: Device, share: float) -> Device:
    """The cores, memory and bandwidth of a host that fall to some of its devices."""
    part = host.sliced(max(1, int(host.num_units * share)), memory_share=share)
    return replace(part, memory_bandwidth=host.memory_bandwidth * share)


def share_cpu(node: Node, num_ranks: int) -> Node:
    """Return a CPU machine whose cores, memory and bandwidth are divided among `num_ranks`.

    With more ranks than cores each rank is one core used part of the time.
    """
    device = node.device
    if num_ranks == 1:
        return replace(node, num_devices=1)
    part = device.sliced(max(1, device.num_units // num_ranks), memory_share=1 / num_ranks)
    busy = min(1.0, device.num_units / num_ranks)
    return replace(
        node,
        num_devices=num_ranks,
        device=replace(
            part,
            name=f"{device.name}/{num_ranks}",
            peak_flops={dtype: rate * busy for dtype, rate in part.peak_flops.items()},
            memory_bandwidth=min(part.memory_bandwidth, device.memory_bandwidth / num_ranks),
            unit_rates=(),
        ),
    )


@dataclass(frozen=True)
class _Nodes:
    machine: str
    count: int = 1


@dataclass(frozen=True)
class _File:
    nodes: list[dict[str, Any]]
    name: str = ""
    network: list[dict[str, Any]] = field(default_factory=list)
    devices: dict[str, Any] = field(default_factory=dict)
    hosts: dict[str, Any] = field(default_factory=dict)
    links: dict[str, Any] = field(default_factory=dict)
    machines: dict[str, Any] = field(default_factory=dict)


def read(path: Path) -> Cluster:
    """Return the cluster a TOML file describes; see docs/howto/add-a-device.md for its tables.

    Raises UsageError (missing file, unknown key or name) or FormatError (not TOML).
    """
    tables = config.read_toml(path)
    where = str(path)
    file = config.parse(_File, tables, where=where)
    if not file.nodes:
        raise FormatError(f"{where}: [[nodes]] is empty", remedy="name at least one machine")
    rows = catalogue_.extend(catalogue_.builtin(), tables, where=where)
    groups = []
    for number, values in enumerate(file.nodes):
        row = config.parse(_Nodes, values, where=f"{where} [[nodes]] {number + 1}")
        group = _group(row.machine, row.machine, rows)
        groups.append(Group(group.node, group.count * row.count))
    levels = tuple(
        config.parse(Level, values, where=f"{where} [[network]] {number + 1}")
        for number, values in enumerate(file.network)
    )
    return Cluster(file.name or path.stem, tuple(groups), levels or (Level(),))
