"""Read devices, links and machines from catalogue.toml and find them by name."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from toolkit import config
from toolkit.errors import UsageError, unknown_name
from toolkit.hardware.device import Device
from toolkit.hardware.link import Link
from toolkit.hardware.node import Node
from toolkit.units import GIB, MIB

# Names that mean the machine this runs on.
THIS = ("this", "cpu")
# One operator on a host, as generic-cpu's.
_HOST_OVERHEAD_S = 3e-6


@dataclass(frozen=True)
class _DeviceRow:
    kind: str
    memory_gib: float
    memory_bandwidth: float
    peak_flops: dict[str, float]
    num_units: int
    launch_overhead_s: float
    source: str
    unit_granularity: tuple[int, int] = (1, 1)
    title: str = ""
    l2_mib: float = 0.0
    pcie_generation: int | None = None
    host_bandwidth: float = math.inf
    compute_capability: str | None = None
    aliases: list[str] = field(default_factory=list)
    machine: str | None = None


@dataclass(frozen=True)
class _LinkRow:
    bandwidth: float
    latency_s: float
    efficiency: float = 1.0
    shared: bool = False
    source: str = ""


@dataclass(frozen=True)
class _HostRow:
    memory_gib: float
    memory_bandwidth: float
    float32_flops: float
    num_cores: int
    source: str


@dataclass(frozen=True)
class _MachineRow:
    device: str
    num_devices: int
    topology: str
    link: str
    source: str
    host_link: str | None = None
    host: str | None = None
    nic: str | None = None
    num_nics: int = 0
    wires: list[tuple[int, int, int]] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Catalogue:
    """Everything that has a name. `aliases` leads from other names to these."""

    devices: dict[str, Device]
    hosts: dict[str, Device]  # what accelerators are plugged into; no machine's devices
    links: dict[str, Link]
    machines: dict[str, Node]
    aliases: dict[str, str]
    machine_of: dict[str, str]  # device -> the machine that NAMExN means

    def device(self, name: str) -> Device:
        """Return a device by name or alias."""
        return _find("device", name, self.devices, self.aliases)

    def host(self, name: str) -> Device:
        """Return a host by name."""
        return _find("host", name, self.hosts, {})

    def link(self, name: str) -> Link:
        """Return a link by name."""
        return _find("link", name, self.links, {})

    def machine(self, name: str) -> Node:
        """Return a machine by its name, an alias, or the name of a device that implies one."""
        key = self.aliases.get(name, name)
        key = self.machine_of.get(key, key)
        known = {**self.machines, **dict.fromkeys(self.machine_of)}
        if key not in self.machines:
            raise unknown_name("machine or device", name, {*known, *self.aliases})
        return self.machines[key]


def _find(what: str, name: str, rows: dict[str, Any], aliases: dict[str, str]) -> Any:
    key = aliases.get(name, name)
    if key not in rows:
        raise unknown_name(what, name, {*rows, *(a for a, to in aliases.items() if to in rows)})
    return rows[key]


@functools.cache
def builtin() -> Catalogue:
    """Return the catalogue that comes with the toolkit."""
    path = resources.files("toolkit.hardware") / "catalogue.toml"
    with resources.as_file(path) as file:
        return extend(None, config.read_toml(file), where="catalogue.toml")


def extend(base: Catalogue | None, tables: dict[str, Any], *, where: str) -> Catalogue:
    """Return `base` with the `devices`, `hosts`, `links` and `machines` of a TOML file added.

    Raises UsageError for an unknown key, a wrong value, a name that is taken, or a reference to a
    row that does not exist.
    """
    made = (
        Catalogue(
            dict(base.devices), dict(base.hosts), dict(base.links), dict(base.machines),
            dict(base.aliases), dict(base.machine_of),
        )
        if base
        else Catalogue({}, {}, {}, {}, {}, {})
    )  # fmt: skip
    for name, values in tables.get("devices", {}).items():
        _add_device(made, name, config.parse(_DeviceRow, values, where=f"{where} [devices.{name}]"))
    for name, values in tables.get("hosts", {}).items():
        host = config.parse(_HostRow, values, where=f"{where} [hosts.{name}]")
        made.hosts[_free(made, name, where)] = _host(name, host)
    for name, values in tables.get("links", {}).items():
        row = config.parse(_LinkRow, values, where=f"{where} [links.{name}]")
        made.links[_free(made, name, where)] = Link(name=name, **vars(row))
    for name, values in tables.get("machines", {}).items():
        where_row = f"{where} [machines.{name}]"
        _add_machine(made, name, config.parse(_MachineRow, values, where=where_row), where_row)
    for device, machine in made.machine_of.items():
        if machine not in made.machines:
            raise UsageError(f"{where} [devices.{device}]: no machine is named {machine!r}")
    return made


def _free(made: Catalogue, name: str, where: str) -> str:
    taken = {*made.devices, *made.hosts, *made.links, *made.machines, *made.aliases, *THIS}
    if name in taken:
        raise UsageError(f"{where}: the name {name!r} is taken", remedy="choose another")
    return name


def _add_device(made: Catalogue, name: str, row: _DeviceRow) -> None:
    where = f"[devices.{name}]"
    made.devices[_free(made, name, where)] = Device(
        name=name,
        kind=row.kind,  # type: ignore[arg-type]  # Device checks it
        memory_bytes=round(row.memory_gib * GIB),
        memory_bandwidth=row.memory_bandwidth,
        peak_flops=row.peak_flops,
        num_units=row.num_units,
        unit_granularity=row.unit_granularity,
        launch_overhead_s=row.launch_overhead_s,
        source=row.source,
        title=row.title or name,
        l2_bytes=round(row.l2_mib * MIB),
        pcie_generation=row.pcie_generation,
        host_bandwidth=row.host_bandwidth,
        compute_capability=row.compute_capability,
    )
    for alias in row.aliases:
        made.aliases[_free(made, alias, where)] = name
    if row.machine:
        made.machine_of[name] = row.machine


def _host(name: str, row: _HostRow) -> Device:
    return Device(
        name=name,
        kind="cpu",
        memory_bytes=round(row.memory_gib * GIB),
        memory_bandwidth=row.memory_bandwidth,
        peak_flops={"float32": row.float32_flops},
        num_units=row.num_cores,
        unit_granularity=(1, 1),
        launch_overhead_s=_HOST_OVERHEAD_S,
        source=row.source,
        title=name,
    )


def _add_machine(made: Catalogue, name: str, row: _MachineRow, where: str) -> None:
    made.machines[_free(made, name, where)] = Node(
        name=name,
        device=made.device(row.device),
        num_devices=row.num_devices,
        topology=row.topology,  # type: ignore[arg-type]  # Node checks it
        link=made.link(row.link),
        host_link=made.link(row.host_link) if row.host_link else None,
        host=made.host(row.host) if row.host else None,
        nic=made.link(row.nic) if row.nic else None,
        num_nics=row.num_nics,
        wires=tuple(row.wires),
        source=row.source,
    )
    for alias in row.aliases:
        made.aliases[_free(made, alias, where)] = name


def device_names(catalogue: Catalogue) -> list[str]:
    """Return every device's name and aliases, sorted."""
    to_devices = (name for name, to in catalogue.aliases.items() if to in catalogue.devices)
    return sorted({*catalogue.devices, *to_devices})


def names(catalogue: Catalogue) -> list[str]:
    """Return every device and machine name and alias, sorted."""
    return sorted({*catalogue.devices, *catalogue.machines, *catalogue.aliases})
