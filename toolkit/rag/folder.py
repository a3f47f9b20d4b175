"""The folder of an index: one writer at a time, and never somebody else's files."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from toolkit.errors import ToolkitError, UsageError

_held = threading.local()  # .paths: the folders this thread writes


@dataclass(frozen=True)
class FileMark:
    """What a file must be: its size and the SHA-256 of its contents."""

    num_bytes: int
    sha256: str


def mark(path: Path) -> FileMark:
    """Return the size and digest of a file.

    >>> import tempfile; file = Path(tempfile.mkdtemp()) / "a"; _ = file.write_bytes(b"abc")
    >>> mark(file).num_bytes, mark(file).sha256[:8]
    (3, 'ba7816bf')
    """
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return FileMark(path.stat().st_size, found.hexdigest())


@contextlib.contextmanager
def locked(path: Path, ours: Callable[[str], bool]) -> Iterator[None]:
    """Hold the writer's lock of the folder `path`, which is made when it is not there.

    `ours(name)` says which files an index of the caller's kind may hold; names that begin with a
    dot always may. A thread that holds a folder may enter again. Raises UsageError when there are
    others, or when another process is writing.
    """
    held = _held.__dict__.setdefault("paths", set())
    if path.resolve() in held:
        yield
        return
    if path.exists():
        if not path.is_dir():
            raise UsageError(f"{path} is a file", remedy="choose a folder for the index")
        if any(not (file.name.startswith(".") or ours(file.name)) for file in path.iterdir()):
            raise UsageError(
                f"{path} holds other files than an index", remedy="choose a new or empty folder"
            )
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("w")
    except OSError as error:
        raise ToolkitError(f"cannot write {path}: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another process is writing {path}",
                remedy="wait for it, or choose another folder",
            ) from error
        held.add(path.resolve())
        try:
            yield  # the lock ends with its process, however that ends
        finally:
            held.discard(path.resolve())


def sync(path: Path) -> None:
    """Make the names in a folder durable: the file system may hold them back otherwise."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
