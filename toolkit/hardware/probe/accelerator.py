"""CUDA and ROCm devices that torch sees: a row from their properties and measured rates.

Written against torch's documented API and tested with a fake; it has not run on hardware yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from toolkit.hardware.probe.timing import best_rate, durations
from toolkit.units import MIB

_DTYPES = ("float32", "float16", "bfloat16")
GEMM_SIZE = 4096
COPY_BYTES = 512 * MIB


def measure(*, budget_s: float) -> list[dict[str, Any]]:
    """Return a row for every accelerator torch can use; none without CUDA or ROCm."""
    import torch

    if not torch.cuda.is_available():
        return []
    count = torch.cuda.device_count()
    return [_row(index, budget_s / count) for index in range(count)]


def _row(index: int, budget_s: float) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    device = torch.device("cuda", index)

    def synced(action: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            action()
            torch.cuda.synchronize(device)

        return run

    part_s = budget_s / (len(_DTYPES) + 2)
    flops = {}
    for dtype in _DTYPES:
        size = GEMM_SIZE
        x = torch.randn(size, size, device=device).to(getattr(torch, dtype))
        weight = torch.randn(size, size, device=device).to(getattr(torch, dtype))
        multiply = synced(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight))  # type: ignore[misc]
        flops[dtype] = best_rate(2.0 * size**3, multiply, budget_s=part_s)
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # A copy reads and writes every byte.
    copied = best_rate(2.0 * source.numel(), synced(lambda: target.copy_(source)), budget_s=part_s)
    small = torch.ones(16, device=device)
    num_calls = 1000

    def launch() -> None:
        for _ in range(num_calls):
            small.add_(1)

    launch_s = min(durations(synced(launch), budget_s=part_s)) / num_calls
    return {
        "name": properties.name,
        "kind": "rocm" if torch.version.hip else "cuda",
        "memory_bytes": properties.total_memory,
        "memory_bandwidth": copied,
        "gemm_flops": flops,
        "num_units": properties.multi_processor_count,
        "l2_bytes": int(getattr(properties, "L2_cache_size", 0)),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "launch_overhead_s": launch_s,
    }
