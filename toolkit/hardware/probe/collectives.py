"""gloo collectives between processes on this machine, fitted to latency + bytes / bandwidth.

The ranks are processes of their own (this module run with -m), because a process group cannot be
borrowed from the caller and because a hung one must be stoppable.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from toolkit.hardware import affinity
from toolkit.units import KIB, MIB

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send")
SIZES = tuple(size * KIB for size in (1, 16, 64, 256)) + tuple(n * MIB for n in (1, 4, 16))
QUICK_SIZES = (4 * KIB, 256 * KIB, 2 * MIB)


def measure(
    num_ranks: int, sizes: Sequence[int], *, budget_s: float, timeout_s: float
) -> dict[str, Any]:
    """Return {"points": {kind: [[bytes, seconds], ...]}, "failed": {kind: reason}}.

    One thread a rank. Raises RuntimeError when a rank fails or `timeout_s` passes.
    """
    with tempfile.TemporaryDirectory(prefix="toolkit-probe-") as folder:
        task = {
            "store": str(Path(folder) / "store"),
            "num_ranks": num_ranks,
            "sizes": list(sizes),
            "budget_s": budget_s / (len(KINDS) * len(sizes)),
        }
        environment = {**os.environ, **affinity.thread_environment(1)}
        if Path("/sys/class/net/lo").exists():
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        command = [sys.executable, "-m", "toolkit.hardware.probe.collectives", json.dumps(task)]
        ranks = [
            subprocess.Popen(
                [*command, str(rank)], env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for rank in range(num_ranks)
        ]  # fmt: skip
        try:
            return _collect(ranks, time.monotonic() + timeout_s, timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
                for pipe in (process.stdout, process.stderr):
                    if pipe:
                        pipe.close()


def _collect(
    ranks: Sequence[subprocess.Popen[str]], deadline: float, timeout_s: float
) -> dict[str, Any]:
    outputs = []
    for rank, process in enumerate(ranks):
        try:
            out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"rank {rank} was not done after {timeout_s:.0f} s") from error
        if process.returncode:
            last = err.strip().splitlines()[-1:] or ["no message"]
            raise RuntimeError(f"rank {rank} ended with {process.returncode}: {last[0]}")
        outputs.append(out)
    found: dict[str, Any] = json.loads(outputs[0].strip().splitlines()[-1])
    return found


def fit(kind: str, num_ranks: int, points: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Fit seconds = latency + bytes / bandwidth, least squares of the relative error, both >= 0.

    >>> row = fit("send", 2, [(1e3, 1.1e-5), (1e6, 1.01e-3), (1e7, 1.001e-2)])
    >>> round(row["latency_s"] * 1e6, 3), round(row["bandwidth"] / 1e9, 3)
    (10.0, 1.0)
    """
    import numpy as np
    from scipy.optimize import nnls

    num_bytes, seconds = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    design = np.stack([np.ones_like(num_bytes), num_bytes], axis=1) / seconds[:, None]
    scale = design.max(axis=0)
    (latency_s, per_byte_s), _ = nnls(design / scale, np.ones_like(seconds))
    latency_s, per_byte_s = latency_s / scale[0], max(per_byte_s / scale[1], 1e-15)
    errors = np.abs((latency_s + num_bytes * per_byte_s) / seconds - 1)
    return {
        "kind": kind,
        "num_ranks": num_ranks,
        "latency_s": float(latency_s),
        "bandwidth": float(1 / per_byte_s),
        "smallest_bytes": int(num_bytes.min()),
        "largest_bytes": int(num_bytes.max()),
        "median_error": float(np.median(errors)),
        "max_error": float(errors.max()),
    }


def _actions(rank: int, num_ranks: int, num_bytes: int) -> dict[str, Callable[[int], None]]:
    """One step of every kind; `num_bytes` is the full tensor. The argument is the step's number.

    Broadcasts change their root and sends go to and fro, so that no rank runs ahead of the rest.
    """
    import torch
    import torch.distributed as dist

    count = max(num_ranks, num_bytes // 4 // num_ranks * num_ranks)
    full, part = torch.ones(count), torch.ones(count // num_ranks)

    def send(step: int) -> None:
        sender = step % 2
        if rank == sender:
            dist.send(full, dst=1 - sender)
        elif rank == 1 - sender:
            dist.recv(full, src=sender)

    def all_to_all(_: int) -> None:
        # Each rank holds 1/n of the tensor.
        piece = part[: part.numel() // num_ranks * num_ranks]
        dist.all_to_all_single(torch.empty_like(piece), piece)

    return {
        "all_reduce": lambda _: dist.all_reduce(full),
        "all_gather": lambda _: dist.all_gather_into_tensor(full, part),
        "reduce_scatter": lambda _: dist.reduce_scatter_tensor(part, full),
        "all_to_all": all_to_all,
        "broadcast": lambda step: dist.broadcast(full, src=step % num_ranks),
        "send": send,
    }


def _seconds(step: Callable[[int], None], budget_s: float) -> float:
    """The mean time of a step on the slowest rank; rank 0 chooses how many steps."""
    import torch
    import torch.distributed as dist

    for number in range(2):
        step(number)
    dist.barrier()
    start = time.perf_counter()
    for number in range(2):
        step(number)
    each = max((time.perf_counter() - start) / 2, 1e-6)
    repeats = torch.tensor([max(4, min(2000, int(budget_s / each) // 2 * 2))])
    dist.broadcast(repeats, src=0)
    best = float("inf")
    for _ in range(3):  # the quietest of three stretches
        dist.barrier()
        start = time.perf_counter()
        for number in range(int(repeats) // 2):
            step(number)
        taken = torch.tensor([(time.perf_counter() - start) / (int(repeats) // 2)])
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        best = min(best, float(taken))
    return best


def _rank_main(task: dict[str, Any], rank: int) -> None:
    """What one rank does; rank 0 prints the result."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    num_ranks = task["num_ranks"]
    dist.init_process_group(
        "gloo", init_method=f"file://{task['store']}", rank=rank, world_size=num_ranks
    )
    points: dict[str, list[tuple[int, float]]] = {}
    failed: dict[str, str] = {}
    for num_bytes in task["sizes"]:
        for kind, step in _actions(rank, num_ranks, num_bytes).items():
            if kind in failed:
                continue
            try:
                taken = _seconds(step, task["budget_s"])
            except (RuntimeError, NotImplementedError) as error:
                failed[kind] = str(error).splitlines()[0]
                continue
            points.setdefault(kind, []).append((num_bytes, taken))
    dist.destroy_process_group()
    if rank == 0:
        sys.stdout.write(json.dumps({"points": points, "failed": failed}) + "\n")


if __name__ == "__main__":
    _rank_main(json.loads(sys.argv[1]), int(sys.argv[2]))
