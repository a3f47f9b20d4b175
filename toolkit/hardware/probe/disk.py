"""Disk rates under a folder: direct reads, so that the page cache does not answer, and a write."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from toolkit.units import KIB, MIB, format_bytes

READ_SIZES = (256 * KIB, 1 * MIB)


def measure(folder: Path, *, file_bytes: int, budget_s: float, readers: tuple[int, ...]) -> Any:
    """Return the body's `disk` table for the file system of `folder`.

    Writes a file of `file_bytes` there, reads it in random and file order with O_DIRECT, and
    removes it. Raises OSError where the folder cannot be written, is nearly full, or does not
    support direct reads (tmpfs, some network and overlay file systems).
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if file_bytes > free // 4:
        raise OSError(f"{folder} has {format_bytes(free)} free, less than four times the test file")
    handle, name = tempfile.mkstemp(dir=folder, prefix=".toolkit-probe-")
    path = Path(name)
    try:
        with os.fdopen(handle, "wb", buffering=0) as file:
            write_bandwidth = _write(file.fileno(), file_bytes)
        plans = [("sequential", 1 * MIB, 1)]
        plans += [("random", size, count) for size in READ_SIZES for count in readers]
        reads = [
            _read(path, pattern, size, num_readers=count, budget_s=budget_s / len(plans))
            for pattern, size, count in plans
        ]
    finally:
        path.unlink(missing_ok=True)
    return {
        "folder": str(folder),
        "file_bytes": file_bytes,
        "reads": reads,
        "write_bandwidth": write_bandwidth,
    }


def _write(descriptor: int, file_bytes: int) -> float:
    """B/s of buffered writes of 1 MiB up to the end of fsync."""
    block = os.urandom(MIB)
    start = time.perf_counter()
    for _ in range(file_bytes // MIB):
        os.write(descriptor, block)
    os.fsync(descriptor)
    return file_bytes / (time.perf_counter() - start)


def _read(path: Path, pattern: str, size: int, *, num_readers: int, budget_s: float) -> Any:
    """Direct reads of `size` for the budget, `num_readers` threads at a time."""
    num_blocks = path.stat().st_size // size
    order = list(range(num_blocks))
    if pattern == "random":
        random.Random(0).shuffle(order)
    latencies: list[list[float]] = [[] for _ in range(num_readers)]
    failures: list[OSError] = []
    begin = time.perf_counter()

    def reader(which: int) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
            # Direct reads need an aligned buffer, which anonymous maps are.
            with mmap.mmap(-1, size) as buffer:
                step = 0
                while not step or time.perf_counter() < begin + budget_s:
                    block = order[(which + step * num_readers) % num_blocks]
                    start = time.perf_counter()
                    if os.preadv(descriptor, [buffer], block * size) != size:
                        raise OSError(f"short read from {path}")
                    latencies[which].append(time.perf_counter() - start)
                    step += 1
            os.close(descriptor)
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=reader, args=(which,)) for which in range(num_readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise OSError(f"no direct reads under {path.parent}: {failures[0]}")
    elapsed = time.perf_counter() - begin
    taken = [latency for own in latencies for latency in own]
    return {
        "num_bytes": size,
        "pattern": pattern,
        "num_readers": num_readers,
        "bandwidth": len(taken) * size / elapsed,
        "median_latency_s": statistics.median(taken),
    }
