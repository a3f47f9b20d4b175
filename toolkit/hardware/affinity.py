"""Which cores this process may use. Everything that starts threads asks here, never cpu_count()."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def cgroup_quota(root: Path = _CGROUP) -> float | None:
    """Return the CPU quota of this control group in cores, or None when there is none."""
    try:
        limit, period = (root / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:  # cgroup v1
        quota = int((root / "cpu/cpu.cfs_quota_us").read_text())
        period_us = int((root / "cpu/cpu.cfs_period_us").read_text())
        return None if quota <= 0 else quota / period_us
    except (OSError, ValueError):
        return None


def usable_cpus() -> tuple[int, ...]:
    """Return the logical CPU numbers of this process's affinity mask, ascending."""
    return tuple(sorted(os.sched_getaffinity(0)))


def usable_cores() -> int:
    """Return how many threads can run at once: the affinity mask, capped by the cgroup quota.

    >>> usable_cores() >= 1
    True
    """
    quota = cgroup_quota()
    allowed = len(usable_cpus())
    return max(1, allowed if quota is None else min(allowed, math.floor(quota)))


def thread_environment(threads: int) -> dict[str, str]:
    """Return the environment that keeps a child process's OpenMP and BLAS pools to `threads`.

    Passive waiting matters on small machines: a spinning pool starves everything beside it.
    """
    count = str(max(1, threads))
    return {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }
