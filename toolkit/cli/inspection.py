"""What this machine has, read and tried: processor, memory, torch, backends, extras, cache.

Each function looks at one thing and returns plain data; `toolkit doctor` shows them. Nothing here
raises because something is missing: that is what is being reported.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from toolkit import config
from toolkit.hardware import affinity

# What matrix kernels choose between, by the names Linux gives them (x86, then ARM).
_SIMD = (
    "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip
_COMPILERS = ("g++", "c++", "clang++")


@dataclass(frozen=True)
class Machine:
    """The processor, memory, disk and tools this process can use."""

    cpu: str
    architecture: str
    simd: tuple[str, ...]
    num_cpus: int
    affinity: tuple[int, ...]
    quota_cores: float | None
    usable_cores: int
    memory_bytes: int | None
    available_bytes: int | None
    memory_limit_bytes: int | None
    cache: str
    cache_free_bytes: int | None
    cache_writable: bool
    compiler: str | None
    python: str
    executable: str
    system: str


def machine(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> Machine:
    """Read what the kernel says about this machine and this process's share of it."""
    model, flags = _processor(_text(proc / "cpuinfo"))
    memory = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _text(proc / "meminfo"), re.MULTILINE))
    sizes = {key: int(kib) * 1024 for key, kib in memory.items()}
    cache = config.cache_dir()
    # The cache need not exist yet: the disk it will be on is that of its nearest existing parent.
    disk = next((folder for folder in (cache, *cache.parents) if folder.is_dir()), None)
    return Machine(
        cpu=model or platform.processor() or "unknown",
        architecture=platform.machine(),
        simd=tuple(flag for flag in _SIMD if flag in flags),
        num_cpus=os.cpu_count() or 1,
        affinity=affinity.usable_cpus(),
        quota_cores=affinity.cgroup_quota(cgroup),
        usable_cores=affinity.usable_cores(),
        memory_bytes=sizes.get("MemTotal"),
        available_bytes=sizes.get("MemAvailable"),
        memory_limit_bytes=memory_limit(cgroup, sizes.get("MemTotal")),
        cache=str(cache),
        cache_free_bytes=shutil.disk_usage(disk).free if disk else None,
        cache_writable=disk is not None and os.access(disk, os.W_OK | os.X_OK),
        compiler=_compiler(),
        python=platform.python_version(),
        executable=sys.executable,
        system=f"{platform.system()} {platform.release()}",
    )


def memory_limit(cgroup: Path, total_bytes: int | None) -> int | None:
    """Return the control group's memory limit in bytes, or None when it is no limit at all."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _text(cgroup / name).strip()
        # Version 1 says "no limit" with a number larger than any memory.
        if text.isdigit() and (total_bytes is None or int(text) < total_bytes):
            return int(text)
    return None


def _processor(cpuinfo: str) -> tuple[str, frozenset[str]]:
    """The model name and the feature flags of the first processor."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields.get("model name", ""), frozenset(
        fields.get("flags", fields.get("Features", "")).split()
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _compiler() -> str | None:
    """The first line of `--version` of the C++ compiler torch would find, if it runs."""
    for name in filter(None, (os.environ.get("CXX"), *_COMPILERS)):
        path = shutil.which(name)
        if path is None:
            continue
        try:
            done = subprocess.run(
                [path, "--version"], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            continue
        return done.stdout.partition("\n")[0]
    return None


@dataclass(frozen=True)
class Torch:
    """The installed torch: `error` when it cannot be imported, devices when it sees any."""

    version: str | None = None
    error: str | None = None
    built_for: str = ""
    devices: tuple[dict[str, Any], ...] = ()
    threads: int = 0
    interop_threads: int = 0
    backends: dict[str, str] = field(default_factory=dict)


def torch_build() -> Torch:
    """Import torch and ask it what it was built for, what it sees and which backends start."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch does not load
        return Torch(error=f"{type(error).__name__}: {error}")
    cuda, hip = torch.version.cuda, getattr(torch.version, "hip", None)
    found = []
    if torch.cuda.is_available():
        for at in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(at)
            found.append(
                {
                    "name": device.name,
                    "memory_bytes": device.total_memory,
                    "num_units": device.multi_processor_count,
                }
            )
    return Torch(
        version=torch.__version__,
        built_for=f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPU only",
        devices=tuple(found),
        threads=torch.get_num_threads(),
        interop_threads=torch.get_num_interop_threads(),
        backends=_backends(),
    )


WORKS = "works"
NOT_TRIED = "not tried: a process group is already running"


def _backends() -> dict[str, str]:
    """Each communication backend: that it works (a reduction was run), or why it does not."""
    import torch.distributed as dist

    if not dist.is_available():
        return dict.fromkeys(("gloo", "nccl", "fake"), "torch was built without torch.distributed")
    found = {
        "gloo": _tried("gloo") if dist.is_gloo_available() else "not in this build of torch",
        "nccl": "not in this build of torch",
        "fake": _tried("fake"),
    }
    if dist.is_nccl_available():
        import torch

        found["nccl"] = _tried("nccl") if torch.cuda.is_available() else "no CUDA device"
    return found


def _tried(backend: str) -> str:
    """Start a group of one process on `backend` and reduce a number over it."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return NOT_TRIED
    try:
        store: Any = dist.HashStore()  # type: ignore[attr-defined]
        if backend == "fake":
            from torch.testing._internal.distributed.fake_pg import FakeStore

            store = FakeStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            dist.all_reduce(torch.ones(1, device="cuda" if backend == "nccl" else "cpu"))
        finally:
            dist.destroy_process_group()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return WORKS


@dataclass(frozen=True)
class Package:
    """One requirement and what is installed for it. `problem` is None when it is met."""

    name: str
    wanted: str
    installed: str | None
    problem: str | None


@dataclass(frozen=True)
class Extra:
    """An optional set of packages ("" is the core). `install` is the command that completes it."""

    name: str
    packages: tuple[Package, ...]
    install: str

    @property
    def complete(self) -> bool:
        return all(package.problem is None for package in self.packages)


def extras(distribution: str = "toolkit") -> tuple[Extra, ...]:
    """Return the core ("") and each extra, as the installed package's own metadata lists them.

    An extra made only of other extras is left out. Empty when toolkit runs without being installed.
    """
    try:
        about = metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return ()
    requirements = [Requirement(text) for text in about.requires or ()]
    names = about.metadata.get_all("Provides-Extra") or []
    found = []
    for extra in ("", *names):
        wanted = [
            requirement
            for requirement in requirements
            if _belongs(requirement, extra) and requirement.name != distribution
        ]
        if wanted or not extra:
            target = f"'{distribution}[{extra}]'" if extra else distribution
            found.append(Extra(extra, tuple(map(_package, wanted)), f"{pip()} install {target}"))
    return tuple(found)


def _belongs(requirement: Requirement, extra: str) -> bool:
    """Whether `extra` asks for `requirement` here, and the core does not already."""
    marker = requirement.marker
    in_core = marker is None or marker.evaluate({"extra": ""})
    if not extra or in_core:
        return in_core and not extra
    return marker is not None and marker.evaluate({"extra": extra})


def _package(requirement: Requirement) -> Package:
    try:
        installed = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Package(requirement.name, str(requirement.specifier), None, "not installed")
    met = requirement.specifier.contains(installed, prereleases=True)
    return Package(
        requirement.name,
        str(requirement.specifier),
        installed,
        None if met else f"{installed} is installed, {requirement.specifier} is needed",
    )


def pip() -> str:
    """How to call the pip of the running interpreter."""
    named = shutil.which("python")
    same = named is not None and Path(named).absolute() == Path(sys.executable).absolute()
    return "pip" if same else f"{sys.executable} -m pip"


@dataclass(frozen=True)
class Threads:
    """What decides how many threads numerical libraries start."""

    usable_cores: int
    torch_threads: int
    environment: dict[str, str]


def threads(usable_cores: int, torch_threads: int) -> Threads:
    """Return the thread settings in force (only the variables that are set)."""
    names = (*affinity.thread_environment(1), "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
    return Threads(
        usable_cores,
        torch_threads,
        {name: os.environ[name] for name in names if name in os.environ},
    )


def cached_models() -> dict[str, str | None]:
    """Return each built-in model with the path of its cached weights, or None."""
    from toolkit.models import weights

    found = {name: weights.cached(name) for name in weights.BUILTINS}
    return {name: None if path is None else str(path) for name, path in found.items()}
