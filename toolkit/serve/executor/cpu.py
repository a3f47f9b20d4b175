"""Runs batches on CPU cores, in the thread that calls it and the decoder's own."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from toolkit.hardware.affinity import usable_cpus
from toolkit.serve.batch import Batch, StepResult
from toolkit.serve.model import sampler
from toolkit.serve.model.cache import PagedKV
from toolkit.serve.model.decoder import Decoder
from toolkit.serve.model.inputs import prepare
from toolkit.serve.model.native import NativeDecoder


class CpuExecutor:
    """A decoder, its KV cache, and the cores they run on."""

    def __init__(
        self,
        decoder: Decoder | NativeDecoder,
        *,
        num_blocks: int,
        block_size: int,
        threads: int,
        pin: bool = False,
    ) -> None:
        """`pin` ties the thread that calls `start`, and those beside it, to `threads` cores."""
        self.decoder = decoder
        self.num_blocks = num_blocks
        self.cache = decoder.make_cache(num_blocks, block_size)
        self.threads = threads
        # From the top: what else runs in the process, the server first of all, stays low.
        self.cpus: tuple[int, ...] = usable_cpus()[-self.threads :] if pin else ()

    def start(self) -> None:
        """Set this thread's cores, which torch's pool inherits at its first use; start the team."""
        if self.cpus:
            os.sched_setaffinity(0, self.cpus)
        torch.set_num_threads(self.threads)
        self.decoder.start(self.threads, self.cpus)

    def run(self, batch: Batch) -> StepResult:
        """Compute the batch's tokens and draw the next of each slice that samples."""
        return compute(self.decoder, self.cache, batch)

    def successor(self) -> CpuExecutor:
        """Return an executor of the same weights with an empty cache."""
        made = copy.copy(self)
        made.cache = self.decoder.make_cache(self.num_blocks, self.cache.block_size)
        return made

    def close(self) -> None:
        """Let go of the cache's memory."""
        self.cache.clear()


@torch.inference_mode()
def compute(decoder: Decoder | NativeDecoder, cache: PagedKV, batch: Batch) -> StepResult:
    """Compute a batch's tokens and draw the next of each slice that samples."""
    step, hidden = prepare(batch, cache.block_size), None
    if len(step.pooled_rows):
        hidden = torch.empty(len(step.pooled_rows), decoder.config.hidden_size)
    logits = decoder.forward(step, cache, hidden)
    return sampler.draw(logits, batch, hidden, decoder.likeliest)


def available_memory_bytes(
    meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int:
    """Return the memory this process may still take: the system's, capped by its control group."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit = _first_number(cgroup / "memory.max", cgroup / "memory/memory.limit_in_bytes")
    used = _first_number(cgroup / "memory.current", cgroup / "memory/memory.usage_in_bytes")
    return free if limit is None or used is None else max(0, min(free, limit - used))


def _first_number(*paths: Path) -> int | None:
    """Return the number in the first of `paths` that holds one (cgroup v2, then v1)."""
    texts: Sequence[str] = [path.read_text().strip() for path in paths if path.is_file()]
    return next((int(text) for text in texts if text.isdigit()), None)
