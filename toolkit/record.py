"""Files that are written whole or not at all, and checked when read: version, digest, provenance.

A record is one JSON object `{"format", "version", "digest", "provenance", "body"}`. The digest
covers the body, so a torn or hand-edited file is named instead of believed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import toolkit
from toolkit.errors import FormatError, ToolkitError, UsageError


def digest(body: Any) -> str:
    """Return the SHA-256 of a JSON value in canonical form; key order does not matter.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """Yield a temporary file that becomes `path` only when the block ends without an error.

    The data is on disk before the rename, and the rename before the return (fsync of file and
    folder), so a crash or a full disk leaves the old file or the new one, never a torn one.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a result is as readable as any other file the user makes.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise ToolkitError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic(path) as file:
        file.write(data)


def provenance() -> dict[str, Any]:
    """Return where a result comes from: versions, commit, machine, command line, time (UTC)."""
    versions = {"toolkit": toolkit.__version__, "python": platform.python_version()}
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions["torch"] = metadata.version("torch")
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["toolkit", *sys.argv[1:]]),
        "commit": _commit(),
        "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cpus",
        "versions": versions,
    }


def _commit() -> str | None:
    """The commit of the source tree this package runs from, when it is a git checkout."""
    source = Path(__file__).resolve().parent.parent
    if not (source / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=5, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def write(path: Path, *, kind: str, version: int, body: Any) -> str:
    """Write `body` (a JSON value) as a record of `kind`; return its digest."""
    mark = digest(body)
    record = {
        "format": f"toolkit/{kind}",
        "version": version,
        "digest": mark,
        "provenance": provenance(),
        "body": body,
    }
    write_bytes(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
    return mark


def read(path: Path, *, kind: str, version: int) -> dict[str, Any]:
    """Return the whole record at `path` (its "body" is the payload), checked.

    Raises UsageError when the file is missing, FormatError when it is torn, of another kind, of
    another version, or altered since it was written.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UsageError(f"no such file: {path}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, too deep, too long
        raise FormatError(f"{path} is corrupt: {error}", remedy="write it again") from error
    found = record.get("format") if isinstance(record, dict) else None
    if found != f"toolkit/{kind}":
        raise FormatError(f"{path} is not a {kind} file (its format is {found!r})")
    if record.get("version") != version:
        raise FormatError(
            f"{path} is version {record.get('version')} of the {kind} format, this toolkit reads "
            f"version {version}",
            remedy="write it again with this toolkit",
        )
    if record.get("digest") != digest(record.get("body")):
        raise FormatError(
            f"{path} does not match its digest: it is torn or was edited", remedy="write it again"
        )
    return record
