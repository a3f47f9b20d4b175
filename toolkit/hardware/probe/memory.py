"""Memory read bandwidth, after STREAM (McCalpin): arrays far larger than the caches."""

from __future__ import annotations

import os
from pathlib import Path

from toolkit.hardware.probe.timing import best_rate
from toolkit.units import MIB


def read_bandwidth(num_bytes: int, *, budget_s: float) -> float:
    """Return B/s of reading an array of `num_bytes` once, the faster of a sum and a matrix-vector
    product; threads as the caller set them."""
    import torch

    columns = 4096
    matrix = torch.ones(num_bytes // 4 // columns, columns)
    vector = torch.ones(columns)
    size = matrix.numel() * 4
    return max(
        best_rate(size, matrix.sum, budget_s=budget_s / 2),
        best_rate(size, lambda: torch.mv(matrix, vector), budget_s=budget_s / 2),
    )


def array_bytes(*, quick: bool) -> int:
    """Return an array size: eight times the last-level cache, within an eighth of free memory."""
    wanted = max((128 if quick else 256) * MIB, 8 * cache_bytes() if not quick else 0)
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(16 * MIB, min(wanted, available // 8))


def cache_bytes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Return the size of the largest cache that core 0 sees; 0 when the system does not say."""
    sizes = [0]
    for file in root.glob("index*/size"):
        text = file.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * 1024)
    return max(sizes)


def total_bytes() -> int:
    """Return this machine's memory, or the control group's limit where that is lower."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        file = Path("/sys/fs/cgroup") / name
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total
