"""The probed row of this machine: a record that `toolkit hardware probe` writes and others find."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit import config, record
from toolkit.errors import FormatError, UsageError
from toolkit.hardware import affinity
from toolkit.hardware import catalogue as catalogue_
from toolkit.hardware.device import Device, Disk, DiskRead, UnitRate
from toolkit.hardware.link import Link
from toolkit.hardware.node import CollectiveFit, Node

KIND, VERSION = "hardware-probe", 1


@dataclass(frozen=True)
class Fingerprint:
    """What must agree for a probed row to speak of a machine."""

    processor: str
    num_cores: int

    @classmethod
    def here(cls) -> Fingerprint:
        """Return this machine's, as this process may use it."""
        return cls(processor_name(), affinity.usable_cores())


def processor_name() -> str:
    """Return the processor's model as the system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass  # no /proc: the interpreter knows less, but something
    return platform.processor() or platform.machine()


def default_path() -> Path:
    """Return where the row of this machine is kept: $TOOLKIT_PROBE, else in the cache folder."""
    chosen = os.environ.get("TOOLKIT_PROBE")
    return Path(chosen) if chosen else config.cache_dir() / "hardware" / "this.json"


def load(path: Path) -> Node:
    """Return the machine a probe record describes, its ranks still undivided.

    Raises UsageError when missing, FormatError when it is not such a record or lacks what a
    device needs (a probe whose GEMM or memory part failed).
    """
    body = record.read(path, kind=KIND, version=VERSION)["body"]
    try:
        return node_from(body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            f"{path} is not a whole hardware probe: {error!r}", remedy="probe again"
        ) from error


def this_machine(*, required: bool) -> Node | None:
    """Return this machine's probed row; None (or UsageError when `required`) without one.

    A row probed on another processor or with another number of cores is not used.
    """
    path = default_path()
    remedy = "run `toolkit hardware probe`"
    if not path.is_file():
        if required:
            raise UsageError("this machine has not been probed", remedy=remedy)
        return None
    body = record.read(path, kind=KIND, version=VERSION)["body"]
    probed, here = body.get("fingerprint"), vars(Fingerprint.here())
    if probed != here:
        if required:
            raise UsageError(
                f"{path} was probed on {probed}, and this machine is {here}", remedy=remedy
            )
        return None
    return load(path)


def node_from(body: Mapping[str, Any]) -> Node:
    """Return the machine a probe's body describes.

    A dtype that was not measured has no peak: asking for it is an error, not a guess.
    """
    rates = []
    for row in body["threads"]:
        flops = {dtype: rate for dtype, rate in row["gemm_flops"].items() if rate is not None}
        if "float32" in flops and row["memory_bandwidth"] is not None:
            rates.append(UnitRate(row["num_threads"], flops, row["memory_bandwidth"]))
    if not rates:
        raise ValueError("no thread count has both a float32 GEMM and a memory measurement")
    best = max(rates, key=lambda rate: rate.num_units)
    generic = catalogue_.builtin().machine("generic-cpu")
    fits = tuple(CollectiveFit(**row) for row in body["collectives"])
    machine = f"{body['fingerprint']['processor']}, {body['fingerprint']['num_cores']} cores"
    device = Device(
        name="this",
        title=machine,
        kind="cpu",
        memory_bytes=body["memory_bytes"],
        memory_bandwidth=best.memory_bandwidth,
        peak_flops=best.peak_flops,
        num_units=best.num_units,
        unit_granularity=(1, 1),
        launch_overhead_s=body["op_overhead_s"] or generic.device.launch_overhead_s,
        host_bandwidth=best.memory_bandwidth,
        source=f"measured by `toolkit hardware probe` at {body['probed_at']}",
        measured=True,
        unit_rates=tuple(rates),
        disk=_disk(body.get("disk")),
    )
    return Node(
        name="this",
        device=device,
        num_devices=best.num_units,
        topology="shared",
        link=_link(fits, generic.link),
        nic=generic.nic,
        num_nics=generic.num_nics,
        source=device.source,
        measured=fits,
    )


def accelerator(path: Path, index: int) -> Device:
    """Return a GPU that the probe at `path` measured; UsageError when it found no such."""
    rows = record.read(path, kind=KIND, version=VERSION)["body"]["accelerators"]
    if not 0 <= index < len(rows):
        raise UsageError(
            f"the probe found {len(rows)} accelerators, none with number {index}",
            remedy="run `toolkit hardware probe` where torch sees the device",
        )
    row = rows[index]
    major = int(row["compute_capability"].split(".")[0])
    # Green contexts' (smallest, multiple) by compute capability; ROCm masks single CUs.
    granularity = {7: (2, 2), 8: (4, 2)}.get(major, (8, 8)) if row["kind"] == "cuda" else (1, 1)
    return Device(
        name=f"this:{index}",
        title=row["name"],
        kind=row["kind"],
        memory_bytes=row["memory_bytes"],
        memory_bandwidth=row["memory_bandwidth"],
        peak_flops=row["gemm_flops"],
        num_units=row["num_units"],
        unit_granularity=granularity,
        launch_overhead_s=row["launch_overhead_s"],
        l2_bytes=row["l2_bytes"],
        compute_capability=row["compute_capability"],
        source="measured by `toolkit hardware probe`, by code not yet tried on hardware",
        measured=True,
    )


def _disk(row: Mapping[str, Any] | None) -> Disk | None:
    if row is None:
        return None
    return Disk(
        row["folder"], tuple(DiskRead(**read) for read in row["reads"]), row["write_bandwidth"]
    )


def _link(fits: tuple[CollectiveFit, ...], fallback: Link) -> Link:
    """The alpha-beta link that a ring all-reduce of two ranks implies.

    For n ranks T = 2(n-1) alpha + 2(n-1)/n bytes/beta; the medium is shared, so its bandwidth is
    n times what one rank gets.
    """
    for fit in fits:
        if fit.kind == "all_reduce":
            n = fit.num_ranks
            per_rank = 2 * (n - 1) / n * fit.bandwidth
            return Link(
                "gloo on this machine",
                per_rank * n,
                fit.latency_s / (2 * (n - 1)),
                shared=True,
                source=f"fitted to measured all-reduces of {n} ranks",
            )
    return fallback
