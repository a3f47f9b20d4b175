"""`toolkit doctor`: what this machine has, what works, and what to install for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import typer
from rich.console import Group
from rich.text import Text

from toolkit.cli import diagnosis, inspection, view
from toolkit.units import format_bytes

app = typer.Typer(add_completion=False)


@app.command()
def doctor(as_json: view.Json = False) -> None:
    """Say what this machine has, which backends and extras work, and what to do about the rest.

    Exits with 0 when the core works and with 1 when something essential is broken.

    Example: toolkit doctor
    """
    with view.progress(quiet=as_json) as bar:
        task = bar.add_task("reading the machine", total=3)
        here = inspection.machine()
        bar.update(task, advance=1, description="starting torch and its backends")
        torch = inspection.torch_build()
        bar.update(task, advance=1, description="reading what is installed")
        packages = inspection.extras()
        models = inspection.cached_models()
        bar.update(task, advance=1)
    running = inspection.threads(here.usable_cores, torch.threads)
    found = diagnosis.findings(here, torch, packages, running)
    broken = any(finding.essential for finding in found)
    facts = {
        "works": not broken,
        "machine": asdict(here),
        "torch": asdict(torch),
        "threads": asdict(running),
        "extras": {
            extra.name or "core": {**asdict(extra), "complete": extra.complete}
            for extra in packages
        },
        "models": models,
        "findings": [asdict(finding) for finding in found],
    }
    view.emit(
        facts,
        as_json=as_json,
        render=lambda: Group(
            _machine(here, running),
            _torch(torch),
            _extras(packages),
            _models(models),
            _findings(found),
        ),
    )
    if broken:
        raise typer.Exit(1)


def _machine(here: inspection.Machine, running: inspection.Threads) -> Any:
    quota = "none" if here.quota_cores is None else f"{here.quota_cores:g} cores"
    limit = "none" if here.memory_limit_bytes is None else format_bytes(here.memory_limit_bytes)
    rows = [
        ("processor", f"{here.cpu} ({here.architecture})"),
        ("instructions", " ".join(here.simd) or "none that matrix kernels use"),
        ("usable cores", f"{here.usable_cores} of {here.num_cpus} (quota {quota})"),
        ("affinity", _ranges(here.affinity)),
        ("memory", f"{_bytes(here.memory_bytes)}, {_bytes(here.available_bytes)} available"),
        ("memory limit", limit),
        ("cache", f"{here.cache}: {_bytes(here.cache_free_bytes)} free on its disk"),
        ("C++ compiler", here.compiler or "none"),
        ("python", f"{here.python} at {here.executable}"),
        ("system", here.system),
        (
            "thread settings",
            " ".join(f"{name}={value}" for name, value in running.environment.items()) or "none",
        ),
    ]
    return _table("This machine", ["what", "found"], rows)


def _torch(torch: inspection.Torch) -> Any:
    if torch.error:
        return _table("PyTorch", ["what", "found"], [("torch", torch.error)])
    devices = [
        f"{device['name']}, {format_bytes(device['memory_bytes'])}, {device['num_units']} units"
        for device in torch.devices
    ]
    rows = [
        ("torch", f"{torch.version}, built for {torch.built_for}"),
        ("devices", "\n".join(devices) or "the CPU"),
        ("threads", f"{torch.threads}, and {torch.interop_threads} between operators"),
        *torch.backends.items(),
    ]
    return _table("PyTorch", ["what", "found"], rows)


def _extras(packages: tuple[inspection.Extra, ...]) -> Any:
    rows = []
    for extra in packages:
        installed = [f"{p.name} {p.installed}" for p in extra.packages if p.problem is None]
        missing = [f"{p.name}: {p.problem}" for p in extra.packages if p.problem]
        rows.append(
            (
                extra.name or "core",
                "complete" if extra.complete else "\n".join(missing),
                ", ".join(installed),
                "" if extra.complete else extra.install,
            )
        )
    return _table("Core and extras", ["extra", "state", "installed", "to complete it"], rows)


def _models(models: dict[str, str | None]) -> Any:
    rows = [
        (name, path or f"not cached; get it with: toolkit models get {name}")
        for name, path in models.items()
    ]
    return _table("Built-in models", ["model", "weights"], rows)


def _findings(found: tuple[diagnosis.Finding, ...]) -> Any:
    if not found:
        return Text("Nothing needs attention.", style="bold")
    rows = [
        ("broken" if finding.essential else "warning", finding.problem, finding.remedy)
        for finding in found
    ]
    return _table("What needs attention", ["", "problem", "remedy"], rows)


def _table(title: str, columns: list[str], rows: Sequence[Sequence[str]]) -> Any:
    # 'toolkit[serve]' holds what a table would take for markup.
    return view.table(title, columns, rows)


def _bytes(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else format_bytes(num_bytes)


def _ranges(cpus: tuple[int, ...]) -> str:
    """CPU numbers as Linux writes them: 0-3,8."""
    runs: list[list[int]] = []
    for cpu in cpus:
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return "CPUs " + ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
