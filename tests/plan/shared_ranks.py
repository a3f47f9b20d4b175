"""Compare collectives through memory with torch's own, on every rank.

Called as: shared_ranks.py FOLDER TIMES (through toolkit.plan.launch). A FOLDER that does not exist
or has no room leaves ranks without: then buffers are plain memory, and nobody meets.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.plan import counting, runtime
from toolkit.plan.lower import shared

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
CPU = torch.device("cpu")


def meet(seed: int, group: dist.ProcessGroup) -> None:
    """All three kinds over buffers of random sizes, the same on all ranks, with random numbers."""
    drawn = random.Random(seed)
    num_ranks = dist.get_world_size(group)
    most = drawn.choice((7, 5_000, 400_000))  # the last takes several chunks
    sizes = [
        (num_ranks * drawn.randint(1, most // num_ranks), drawn.choice(DTYPES)) for _ in range(4)
    ]
    buffers, room = shared.buffers(sizes, CPU, group)
    assert room is not None
    assert all(not buffer.any() for buffer in buffers)
    torch.manual_seed(1000 * seed + dist.get_rank())
    for buffer in buffers:
        buffer.copy_(torch.randn(buffer.shape))
    given = [buffer.clone() for buffer in buffers]

    parts = [buffer.new_empty(buffer.numel() // num_ranks) for buffer in buffers]
    with counting.Counter() as counter:
        room.reduce_scatter(buffers, parts)
        room.all_gather(buffers)
        room.all_reduce(buffers)
    total = sum(buffer.numel() * buffer.element_size() for buffer in buffers)
    assert counter.calls == {
        kind: (len(buffers), total) for kind in ("reduce_scatter", "all_gather", "all_reduce")
    }
    for own, part, after in zip(given, parts, buffers, strict=True):
        wanted = torch.empty_like(part)
        dist.reduce_scatter_single(wanted, own.clone(), group=group)
        close(part, wanted)
        # Gathered, everybody had what their n-ths were; then they added up n times that.
        gathered = torch.empty_like(own)
        begin = dist.get_rank(group) * len(part)
        dist.all_gather_single(gathered, own[begin : begin + len(part)].clone(), group=group)
        close(after, gathered * num_ranks)
        everybody = [torch.empty_like(after) for _ in range(num_ranks)]
        dist.all_gather(everybody, after, group=group)
        assert all(torch.equal(one, after) for one in everybody)


def close(one: Tensor, other: Tensor) -> None:
    rounding = 4 * torch.finfo(one.dtype).eps
    assert torch.allclose(one, other, rtol=rounding, atol=rounding)


def main() -> None:
    folder, times = Path(sys.argv[1]), int(sys.argv[2])
    shared.FOLDER = folder
    with runtime.session() as here:
        everybody = dist.group.WORLD
        assert everybody is not None
        if not folder.is_dir() or os.environ.get("NO_ROOM"):
            if os.environ.get("NO_ROOM") == str(here.rank):
                os.posix_fallocate = full  # type: ignore[assignment]
            buffers, room = shared.buffers([(5, torch.float32)], CPU, everybody)
            assert room is None
            assert buffers[0].tolist() == [0.0] * 5
            return
        for seed in range(times):
            meet(seed, everybody)
            dist.barrier()
            assert not list(folder.iterdir()), "the files have no names once they are open"
            dist.barrier()


def full(*_: int) -> None:
    raise OSError(28, "No space left on device")


if __name__ == "__main__":
    main()
    runtime.leave()
