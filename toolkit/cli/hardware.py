"""`toolkit hardware`: the catalogue, composed clusters, and a probe of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group

from toolkit.cli import view
from toolkit.errors import UsageError, unknown_name
from toolkit.units import format_bytes, format_flops, format_rate, format_seconds

if TYPE_CHECKING:
    from toolkit.hardware import Cluster, Device
    from toolkit.hardware.probe import Result

app = typer.Typer(
    help="Devices and clusters: list, show, probe this machine.",
    no_args_is_help=True,
    add_completion=False,
)


@app.command("list")
def list_(as_json: view.Json = False) -> None:
    """List the devices and machines of the catalogue.

    Peaks are dense datasheet figures, unless the row is this machine's and says measured.

    Example: toolkit hardware list
    """
    from toolkit.hardware import catalogue, measured

    known = catalogue.builtin()
    devices = list(known.devices.values())
    here = measured.this_machine(required=False)
    if here is not None:
        devices.append(here.device)
    machines = list(known.machines.values())
    value = {
        "devices": [_device_fields(device, known) for device in devices],
        "machines": [
            {
                "name": node.name,
                "device": node.device.name,
                "num_devices": node.num_devices,
                "topology": node.topology,
                "link": node.link.name,
                "nic": node.nic.name if node.nic else None,
                "num_nics": node.num_nics,
                "source": node.source,
            }
            for node in machines
        ],
    }

    def render() -> Any:
        return Group(
            view.table(
                "Devices: datasheet figures, dense; `this` is measured",
                ["name", "memory>", "bandwidth>", "float32>", "bfloat16>", "units>"],
                [
                    [
                        device.name,
                        format_bytes(device.memory_bytes),
                        format_rate(device.memory_bandwidth),
                        format_flops(device.peak_flops["float32"], per_second=True),
                        _rate(device, "bfloat16"),
                        device.num_units,
                    ]
                    for device in devices
                ],
            ),
            view.table(
                "Machines",
                ["name", "devices", "wiring", "link", "network"],
                [
                    [
                        node.name,
                        f"{node.num_devices} x {node.device.name}",
                        node.topology,
                        f"{format_rate(node.link.bandwidth)} {node.link.name}",
                        f"{node.num_nics} x {node.nic.name}" if node.nic else "none",
                    ]
                    for node in machines
                ],
            ),
            "Compose clusters by name: h100x8, 16xdgx2, 4xh100x8, dgx2+2xa100x8, cpux2.",
        )

    view.emit(value, as_json=as_json, render=render)


def _rate(device: Device, dtype: str) -> str:
    peak = device.peak_flops.get(dtype)
    return format_flops(peak, per_second=True) if peak else "none"


def _device_fields(device: Device, known: Any) -> dict[str, Any]:
    names = [alias for alias, name in known.aliases.items() if name == device.name]
    return {
        "name": device.name,
        "aliases": sorted(names),
        "title": device.title,
        "kind": device.kind,
        "memory_bytes": device.memory_bytes,
        "memory_bandwidth": device.memory_bandwidth,
        "peak_flops": dict(device.peak_flops),
        "num_units": device.num_units,
        "unit_granularity": list(device.unit_granularity),
        "l2_bytes": device.l2_bytes,
        "pcie_generation": device.pcie_generation,
        "host_bandwidth": device.host_bandwidth if device.host_bandwidth < 1e300 else None,
        "launch_overhead_s": device.launch_overhead_s,
        "compute_capability": device.compute_capability,
        "figures": "measured" if device.measured else "datasheet",
        "source": device.source,
    }


@app.command()
def show(
    name: Annotated[
        str, typer.Argument(help="A device, a machine, a composed cluster or a TOML file.")
    ],
    as_json: view.Json = False,
) -> None:
    """Show one device, or a cluster with what its collectives are predicted to take.

    Example: toolkit hardware show 4xh100x8
    """
    from toolkit.hardware import catalogue, find_cluster, find_device

    known = catalogue.builtin()
    lone = name.lower()
    if lone in {*catalogue.device_names(known), *catalogue.THIS} or lone.startswith("this:"):
        device = find_device(lone)
        fields = _device_fields(device, known)
        view.emit(fields, as_json=as_json, render=lambda: _device_table(device))
        return
    if name.endswith(".json"):
        device = find_device(name)
        fields = _device_fields(device, known)
        view.emit(fields, as_json=as_json, render=lambda: _device_table(device))
        return
    try:
        cluster = find_cluster(name)
    except UsageError as error:
        if "unknown machine or device" not in error.message:
            raise
        raise unknown_name(
            "device or cluster", name, {*catalogue.names(known), *catalogue.THIS}
        ) from error
    view.emit(_cluster_fields(cluster), as_json=as_json, render=lambda: _cluster_tables(cluster))


def _device_table(device: Device) -> Any:
    figures = "measured" if device.measured else "datasheet, dense"
    smallest, multiple = device.unit_granularity
    rows = [
        ["memory", format_bytes(device.memory_bytes)],
        ["memory bandwidth", f"{format_rate(device.memory_bandwidth)} ({figures})"],
        *(
            [f"peak {dtype}", f"{format_flops(rate, per_second=True)} ({figures})"]
            for dtype, rate in device.peak_flops.items()
        ),
        ["units", f"{device.num_units}, slices of at least {smallest} in steps of {multiple}"],
        ["L2 cache", format_bytes(device.l2_bytes) if device.l2_bytes else "not stated"],
        ["operator launch", format_seconds(device.launch_overhead_s)],
    ]
    if device.host_bandwidth < 1e300:
        rows.append(["host copies", format_rate(device.host_bandwidth)])
    rows += [
        [
            f"{rate.num_units} of {device.num_units} units",
            f"float32 {format_flops(rate.peak_flops['float32'], per_second=True)}, memory "
            f"{format_rate(rate.memory_bandwidth)} (measured)",
        ]
        for rate in device.unit_rates
    ]
    if device.disk is not None:
        rows += [
            [
                f"disk, {read.pattern} {format_bytes(read.num_bytes)} x {read.num_readers}",
                f"{format_rate(read.bandwidth)} (measured)",
            ]
            for read in device.disk.reads
        ]
    rows.append(["source", device.source])
    return view.table(device.title or device.name, ["what", "value"], rows)


# Sizes whose predicted times `show` prints.
_SHOWN_BYTES = (64 * 1024, 64 * 1024**2, 1024**3)


def _predictions(cluster: Cluster) -> list[dict[str, Any]]:
    from toolkit.cost import collective

    if cluster.num_devices < 2:
        return []
    found = []
    for kind in ("all_reduce", "all_gather", "all_to_all"):
        for num_bytes in _SHOWN_BYTES:
            cost = collective.cost(kind, num_bytes, cluster.ranks, cluster)
            found.append(
                {
                    "kind": kind,
                    "num_bytes": num_bytes,
                    "predicted_s": cost.seconds,
                    "algorithm": cost.algorithm,
                    "bytes_sent_per_rank": cost.bytes_sent_per_rank,
                    "bytes_by_link": dict(cost.bytes_by_link),
                }
            )
    return found


def _cluster_fields(cluster: Cluster) -> dict[str, Any]:
    return {
        "name": cluster.name,
        "num_devices": cluster.num_devices,
        "num_nodes": cluster.num_nodes,
        "groups": [
            {
                "machine": group.node.name,
                "count": group.count,
                "device": group.node.device.name,
                "devices_per_machine": group.node.num_devices,
                "topology": group.node.topology,
                "link": group.node.link.name,
                "nic": group.node.nic.name if group.node.nic else None,
                "num_nics": group.node.num_nics,
            }
            for group in cluster.groups
        ],
        "network": [vars(level) for level in cluster.network],
        "collectives": _predictions(cluster),
    }


def _cluster_tables(cluster: Cluster) -> Any:
    machines = view.table(
        f"{cluster.name}: devices {cluster.num_devices}, machines {cluster.num_nodes}",
        ["machines>", "kind", "devices each", "link", "network"],
        [
            [
                group.count,
                group.node.name,
                f"{group.node.num_devices} x {group.node.device.name}",
                f"{group.node.link.name}, {group.node.topology}",
                f"{group.node.num_nics} x {group.node.nic.name}" if group.node.nic else "none",
            ]
            for group in cluster.groups
        ],
    )
    predicted = _predictions(cluster)
    if not predicted:
        return machines
    rows = [
        [
            row["kind"],
            format_bytes(row["num_bytes"]),
            format_seconds(row["predicted_s"]),
            row["algorithm"],
        ]
        for row in predicted
    ]
    title = "Collectives over all devices, predicted (alpha-beta)"
    return Group(machines, view.table(title, ["kind", "size>", "time>", "algorithm"], rows))


@app.command()
def probe(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and repeats.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Write the row here, not as this machine's.")
    ] = None,
    disk: Annotated[Path | None, typer.Option(help="Measure the disk under this folder.")] = None,
    as_json: view.Json = False,
) -> None:
    """Measure this machine: GEMM and memory per thread count, disk, gloo collectives, GPUs.

    Writes a row that the names `this`, `cpu` and `cpux2` then stand for. What could not be
    measured is said so and left out. Let nothing else run meanwhile.

    Example: toolkit hardware probe --quick
    """
    from toolkit.hardware import measured, probe

    path = output or measured.default_path()
    with view.progress(quiet=as_json) as bar:
        task = bar.add_task("probe", total=None)

        def on_part(done: int, total: int, title: str) -> None:
            bar.update(task, description=f"probe: {title}", completed=done, total=total)

        result = probe.run(probe.Options.of(quick=quick, disk_folder=disk), on_part=on_part)
    result.write(path)
    value = {**result.body, "not_measured": result.not_measured, "path": str(path)}
    view.emit(value, as_json=as_json, render=lambda: _probe_tables(result, path))


def _probe_tables(result: Result, path: Path) -> Any:
    body = result.body
    dtypes = list(body["threads"][0]["gemm_flops"])
    tables: list[Any] = [
        view.table(
            f"{body['fingerprint']['processor']}, measured (load average "
            f"{body['load_average']:.2f} at the start)",
            ["threads>", *(f"{dtype}>" for dtype in dtypes), "memory read>"],
            [
                [
                    row["num_threads"],
                    *(_or_not(row["gemm_flops"][name], _flop_rate) for name in dtypes),
                    _or_not(row["memory_bandwidth"], format_rate),
                ]
                for row in body["threads"]
            ],
        )
    ]
    if body["disk"]:
        rows = [
            [
                f"{read['pattern']} reads of {format_bytes(read['num_bytes'])}",
                read["num_readers"],
                format_rate(read["bandwidth"]),
            ]
            for read in body["disk"]["reads"]
        ]
        rows.append(
            ["writes, to the end of fsync", 1, format_rate(body["disk"]["write_bandwidth"])]
        )
        title = f"Disk under {body['disk']['folder']}, measured"
        tables.append(view.table(title, ["what", "at once>", "rate>"], rows))
    if body["collectives"]:
        tables.append(
            view.table(
                "gloo, fitted to measurements: time = latency + bytes / bandwidth",
                ["kind", "ranks>", "latency>", "bandwidth>", "median error>", "largest>"],
                [
                    [
                        fit["kind"],
                        fit["num_ranks"],
                        format_seconds(fit["latency_s"]),
                        format_rate(fit["bandwidth"]),
                        f"{fit['median_error']:.0%}",
                        f"{fit['max_error']:.0%}",
                    ]
                    for fit in body["collectives"]
                ],
            )
        )
    if body["accelerators"]:
        tables.append(
            view.table(
                "Accelerators, measured by code not yet tried on hardware",
                ["name", "memory>", "bandwidth>", "float16>"],
                [
                    [
                        row["name"],
                        format_bytes(row["memory_bytes"]),
                        format_rate(row["memory_bandwidth"]),
                        _flop_rate(row["gemm_flops"]["float16"]),
                    ]
                    for row in body["accelerators"]
                ],
            )
        )
    if result.not_measured:
        rows = [[what, reason] for what, reason in result.not_measured.items()]
        tables.append(view.table("Not measured", ["what", "why"], rows))
    return Group(*tables, f"written to {path}")


def _flop_rate(value: float) -> str:
    return format_flops(value, per_second=True)


def _or_not(value: float | None, show_: Any) -> str:
    return "not measured" if value is None else show_(value)
