"""What an inspection of this machine means: what is broken, slow or surprising, and the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from toolkit.cli.inspection import NOT_TRIED, WORKS, Extra, Machine, Threads, Torch, pip
from toolkit.units import GIB, format_bytes

_DRIVER = Path("/dev/nvidiactl")
# The built-in models, an index, and what a demonstration writes.
_WANTED_BYTES = 2 * GIB


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be, and what to do; `essential` when nothing works."""

    problem: str
    remedy: str
    essential: bool = False


def findings(
    here: Machine,
    torch: Torch,
    packages: tuple[Extra, ...],
    running: Threads,
    *,
    driver: bool | None = None,
) -> tuple[Finding, ...]:
    """Judge what was read: what is broken first, then what will be slow or surprising.

    `driver` says whether the machine has an NVIDIA driver; None looks.
    """
    if driver is None:
        driver = _DRIVER.exists()
    found = [*_core(torch, packages), *_devices(torch, packages, driver=driver), *_room(here)]
    cores = here.usable_cores
    if running.torch_threads > cores:
        found.append(
            Finding(
                f"torch starts {running.torch_threads} threads on {_count(cores, 'usable core')}, "
                "and they will wait for each other",
                f"export OMP_NUM_THREADS={cores}",
            )
        )
    if running.environment.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE" and cores <= 4:
        found.append(
            Finding(
                f"OMP_WAIT_POLICY=ACTIVE spins on {_count(cores, 'usable core')}, starving others",
                "export OMP_WAIT_POLICY=PASSIVE",
            )
        )
    if here.architecture in ("x86_64", "AMD64") and "avx2" not in here.simd:
        found.append(
            Finding("this processor has no AVX2: models run, slowly", "use a newer machine")
        )
    if here.compiler is None:
        found.append(
            Finding(
                "no C++ compiler: torch.compile cannot build CPU kernels",
                "apt install g++ (or your system's equivalent), or set CXX",
            )
        )
    return tuple(sorted(found, key=lambda finding: not finding.essential))


def _core(torch: Torch, packages: tuple[Extra, ...]) -> list[Finding]:
    found = []
    if not packages:
        found.append(
            Finding(
                "toolkit runs from a folder without being installed, so what it needs is unknown",
                f"{pip()} install -e . in that folder",
            )
        )
    for extra in packages:
        for package in extra.packages if not extra.name else ():
            if package.problem:
                wanted = f"'{package.name}{package.wanted}'"
                found.append(
                    Finding(
                        f"{package.name}: {package.problem}, and the core needs it",
                        f"{pip()} install {wanted}",
                        essential=True,
                    )
                )
    if torch.error and not any(finding.problem.startswith("torch: not") for finding in found):
        found.append(
            Finding(
                f"torch does not import: {torch.error}",
                f"{pip()} install --force-reinstall torch",
                essential=True,
            )
        )
    return found


def _devices(torch: Torch, packages: tuple[Extra, ...], *, driver: bool) -> list[Finding]:
    found = []
    if torch.backends and torch.backends["gloo"] not in (WORKS, NOT_TRIED):
        found.append(
            Finding(
                f"gloo does not start ({torch.backends['gloo']}): no training on several processes",
                "check that the host's name resolves, or set GLOO_SOCKET_IFNAME=lo",
            )
        )
    if torch.version and not torch.devices and torch.built_for.startswith("CUDA") and driver:
        found.append(
            Finding(
                f"torch is built for {torch.built_for} and sees no device, though a driver is here",
                "check nvidia-smi, CUDA_VISIBLE_DEVICES, and that the driver is new enough",
            )
        )
    if torch.built_for == "CPU only" and driver:
        found.append(
            Finding(
                "this machine has an NVIDIA driver, and torch is built for the CPU only",
                f"{pip()} install --force-reinstall torch from an index with CUDA builds",
            )
        )
    installed = {p.name for extra in packages for p in extra.packages if p.installed}
    if {"faiss-cpu", "faiss-gpu-cu12"} <= installed:
        found.append(
            Finding(
                "faiss-cpu and faiss-gpu-cu12 are both installed and overwrite each other",
                f"{pip()} uninstall faiss-cpu faiss-gpu-cu12, then install one of them",
            )
        )
    return found


def _room(here: Machine) -> list[Finding]:
    found = []
    if not here.cache_writable:
        found.append(
            Finding(
                f"{here.cache} cannot be written: models cannot be cached",
                "set TOOLKIT_CACHE to a folder that can",
            )
        )
    elif here.cache_free_bytes is not None and here.cache_free_bytes < _WANTED_BYTES:
        found.append(
            Finding(
                f"{format_bytes(here.cache_free_bytes)} free for {here.cache}, and the built-in "
                f"models and an index want about {format_bytes(_WANTED_BYTES)}",
                "free some, or set TOOLKIT_CACHE to a larger disk",
            )
        )
    limits = [here.available_bytes, here.memory_limit_bytes]
    memory = min((limit for limit in limits if limit is not None), default=None)
    if memory is not None and memory < _WANTED_BYTES:
        found.append(
            Finding(
                f"{format_bytes(memory)} of memory to use, and serving with an index beside it "
                f"wants about {format_bytes(_WANTED_BYTES)}",
                "close something, or raise the container's limit",
            )
        )
    return found


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
