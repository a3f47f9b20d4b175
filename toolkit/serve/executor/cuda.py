"""What a CUDA device needs besides torch's calls: a check that it is there, memory, and graphs.

It has not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from toolkit.errors import UsageError
from toolkit.serve.executor.device import Place

# Of the memory that is free once the weights are there: the rest is for activations and graphs.
_KV_SHARE = 0.85


def place(dtype: torch.dtype | None = None, index: int = 0, *, num_devices: int = 1) -> Place:
    """Return the CUDA device `index`, with graphs; by default in bfloat16 where it computes in it.

    Raises UsageError unless torch sees `num_devices`, and that device among them.
    """
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = max(num_devices, index + 1)
    if wanted > present:
        build = torch.version.cuda or "no CUDA"
        raise UsageError(
            f"{wanted} CUDA device{'s' if wanted > 1 else ''} wanted, and torch "
            f"{torch.__version__} (built for {build}) sees {present}",
            remedy="install a CUDA build of torch on a machine with an NVIDIA GPU, or use the CPU",
        )
    device = torch.device("cuda", index)
    half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    pool: list[Any] = []

    def recorder() -> CudaGraph:
        if not pool:
            pool.append(torch.cuda.graph_pool_handle())
        return CudaGraph(pool[0])

    def kv_bytes() -> int:
        return int(torch.cuda.mem_get_info(device)[0] * _KV_SHARE)

    return Place(device, dtype or half, kv_bytes, recorder)


class CudaGraph:
    """A recording of kernels: one launch a step. See executor/device.py's Recording."""

    def __init__(self, pool: Any) -> None:
        """`pool` (torch.cuda.graph_pool_handle) is memory that recordings share: one plays at a
        time.
        """
        self._graph, self._pool = torch.cuda.CUDAGraph(), pool

    def record(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run `compute` once for what is compiled and allocated at first use, then record it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            compute()
        torch.cuda.current_stream().wait_stream(side)
        # Other threads may use the device meanwhile: NCCL's watchdog does.
        mode = "thread_local"
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode=mode):
            return compute()

    def replay(self) -> None:
        """Launch what was recorded on the current stream."""
        self._graph.replay()
