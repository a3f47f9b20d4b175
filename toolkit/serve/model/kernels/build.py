"""Build the C++ sources for this machine, once: seconds at first use, then a file in the cache."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from toolkit.config import cache_dir
from toolkit.errors import ToolkitError

_HERE = Path(__file__).parent
_COMPILERS = ("g++", "c++", "clang++")
# No -ffast-math: sums keep their order, and -inf and NaN mean what they say.
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared", "-pthread")
_REMEDY = "install g++ or clang++ (or set CXX); without one the slower torch path is used"


def library_path(folder: Path | None = None) -> Path:
    """Return the shared library built from these sources for this processor, building if need be.

    The name holds a digest of sources, compiler and processor, so a change of any builds anew; of
    two processes that build at once, one waits for the other. Raises ToolkitError when there is
    no compiler or it fails.
    """
    compiler = _compiler()
    folder = folder or cache_dir() / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"decoder-{_digest(compiler)}.so"
    if path.exists():
        return path
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _build(compiler, path)
    return path


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), *_COMPILERS)):
        found = shutil.which(name)
        if found is not None:
            return found
    raise ToolkitError("there is no C++ compiler to build the CPU kernels with", remedy=_REMEDY)


def _digest(compiler: str) -> str:
    sources = [
        file.read_bytes() for file in sorted(_HERE.iterdir()) if file.suffix in (".cpp", ".h")
    ]
    said = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    found = hashlib.sha256(b"\0".join([*sources, said, _processor().encode()]))
    found.update(" ".join(_FLAGS).encode())
    return found.hexdigest()[:24]


@functools.cache
def _processor() -> str:
    """Return what decides which instructions may be used."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    wanted = ("flags", "Features", "model name", "CPU part")
    return platform.machine() + "".join(sorted({x for x in lines if x.startswith(wanted)}))


def _build(compiler: str, path: Path) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".building-", suffix=".so")
    os.close(handle)
    try:
        for tune in (["-march=native"], []):
            command = [compiler, *_FLAGS, *tune, "-o", name, str(_HERE / "decoder.cpp")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                Path(name).rename(path)
                return
    finally:
        Path(name).unlink(missing_ok=True)
    raise ToolkitError(
        f"{compiler} could not build the CPU kernels: {done.stderr.strip()[:500]}", remedy=_REMEDY
    )
