"""Sums and joins over the ranks that hold a model's parts: gloo between CPUs, NCCL between GPUs.

With NCCL it has not run.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from toolkit.serve.model.part import Part

# No step takes so long: a rank that hangs ends the others.
_TIMEOUT_S = 60.0


def meeting_place(port: int | None = None) -> Any:
    """Return the store at which ranks of this machine meet; without `port`, open it at a free one.

    Its `port` is what the others are told.
    """
    host, at = "127.0.0.1", port or 0
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, at, is_master=port is None, wait_for_workers=False
    )


class Ranks:
    """One rank's end of its group. Every rank makes the same calls in the same order.

    A group of its own, not torch's global one: an engine that is replaced leaves its group behind.
    """

    def __init__(self, store: Any, part: Part, device: torch.device) -> None:
        """Meet the others at `store` (`meeting_place`); returns when all have come."""
        self._degree = part.degree
        timeout = timedelta(seconds=_TIMEOUT_S)
        self._group: Any
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(store, part.rank, part.degree, options)
        else:
            # All ranks are on this machine, and no name need be resolved for it.
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
            options._timeout = timeout
            self._group = dist.ProcessGroupGloo(store, part.rank, part.degree, options)

    def add(self, part: torch.Tensor) -> torch.Tensor:
        """Return the sum of every rank's tensor, in place."""
        self._group.allreduce([part]).wait()
        return part

    def join(self, part_NV: torch.Tensor) -> torch.Tensor:
        """Return every rank's columns side by side."""
        parts = [torch.empty_like(part_NV) for _ in range(self._degree)]
        self._group.allgather([parts], [part_NV]).wait()
        return torch.cat(parts, dim=1)

    def abandon(self) -> None:
        """Make calls that wait for a rank that is gone fail."""
        self._group.abort()
