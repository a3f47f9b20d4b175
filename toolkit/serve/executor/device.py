"""Runs batches on a torch device: prompts as they come, decoding as a recording played back.

A step that decodes one token of each sequence is recorded once per bucket, a number of sequences it
is rounded up to, with its numbers (tokens, lengths, block tables) in memory that stays in place;
later steps write their numbers there and play it back. Rows that only fill a bucket have length 0
and write to a block that no sequence is given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from toolkit.serve.batch import Batch, StepResult
from toolkit.serve.model import sampler
from toolkit.serve.model.device import DeviceDecoder, Singles
from toolkit.serve.model.inputs import StepInput, prepare

# Columns of a step's numbers before the block table.
_TOKEN, _LENGTH, _TABLE = 0, 1, 2


class Recording(Protocol):
    """A computation recorded once and played back over the same memory."""

    def record(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run `compute` and remember it; what it returned is overwritten by every `replay`."""
        ...

    def replay(self) -> None:
        """Do again what was recorded, with what now lies in the memory it reads."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a model runs and in what: `recorder` makes an empty recording, None records nothing.

    `kv_bytes` is the memory for a KV cache when nothing is said, asked once the weights are there.
    """

    device: torch.device
    dtype: torch.dtype
    kv_bytes: Callable[[], int]
    recorder: Callable[[], Recording] | None = None


@dataclass(frozen=True)
class Room:
    """How much an executor has place for. `max_context` bounds a sequence's tokens."""

    num_blocks: int
    block_size: int
    max_batch: int
    max_context: int


def buckets(max_batch: int) -> tuple[int, ...]:
    """Return the numbers of sequences that steps are rounded up to.

    >>> buckets(20), buckets(3), buckets(1)
    ((1, 2, 4, 8, 16, 24), (1, 2, 4), (1,))
    """
    sizes = (1, 2, 4, *range(8, max_batch + 8, 8))
    return tuple(size for size, below in zip(sizes, (0, *sizes), strict=False) if below < max_batch)


class DeviceExecutor:
    """A decoder on a device, its KV cache, and the recordings of its decoding steps."""

    cpus: tuple[int, ...] = ()

    def __init__(
        self,
        decoder: DeviceDecoder,
        room: Room,
        *,
        recorder: Callable[[], Recording] | None = None,
        threads: int = 1,
    ) -> None:
        """`recorder` as in Place; `threads` draw what is not drawn on the device."""
        self.decoder, self.room, self.threads = decoder, room, threads
        self._recorder = recorder
        self._allocate()

    def start(self) -> None:
        """Record every bucket, the largest first: the others then fit into its memory."""
        torch.set_num_threads(self.threads)
        if self.decoder.device.type == "cuda":
            torch.cuda.set_device(self.decoder.device)
        if self._recorder is None:
            return
        for bucket in reversed(buckets(self.room.max_batch)):
            recording = self._recorder()
            self._recordings[bucket] = (recording, self._record(recording, bucket))

    def run(self, batch: Batch) -> StepResult:
        """Compute the batch's tokens and draw the next of each slice that samples."""
        logits, hidden = self.compute(prepare(batch, self.room.block_size))
        if not sampler.is_greedy(batch):
            logits = logits.cpu()
        return sampler.draw(logits, batch, None if hidden is None else hidden.float().cpu())

    @torch.inference_mode()
    def compute(self, step: StepInput) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return float32 logits of `sample_rows` and hidden states of `pooled_rows`, on the device.

        The logits are overwritten by the next step.
        """
        if self._recordings and _only_decodes(step):
            return self._replay(step), None
        hidden = None
        if len(step.pooled_rows):
            shape = (len(step.pooled_rows), self.decoder.config.hidden_size)
            hidden = torch.empty(shape, dtype=self.decoder.kv_dtype, device=self.decoder.device)
        return self.decoder.forward(step, self.cache, hidden), hidden  # type: ignore[arg-type]

    def successor(self) -> DeviceExecutor:
        """Return an executor of the same weights with an empty cache.

        This one's is let go of: there is no memory for two, and a step of it that hangs fails when
        it goes on.
        """
        self.close()
        made = copy.copy(self)
        made._allocate()
        return made

    def close(self) -> None:
        """Let go of the cache and of the recordings, which hold memory of their own."""
        self._recordings.clear()
        self.cache.clear()

    def _allocate(self) -> None:
        room, device = self.room, self.decoder.device
        # One block more, which nobody is given: padding writes there.
        self.cache = self.decoder.make_cache(room.num_blocks + 1, room.block_size)
        rows, blocks = buckets(room.max_batch)[-1], -(-room.max_context // room.block_size)
        self._host = torch.zeros(rows, _TABLE + blocks, dtype=torch.int32)
        self._host[:, _TABLE] = room.num_blocks
        if device.type == "cuda":
            self._host = self._host.pin_memory()
        self._numbers = self._host.to(device, copy=True)
        self._recordings: dict[int, tuple[Recording, torch.Tensor]] = {}

    @torch.inference_mode()
    def _record(self, recording: Recording, bucket: int) -> torch.Tensor:
        numbers = self._numbers[:bucket]
        singles = Singles(numbers[:, _TOKEN], numbers[:, _LENGTH], numbers[:, _TABLE:])
        return recording.record(lambda: self.decoder.decode(singles, self.cache))

    def _replay(self, step: StepInput) -> torch.Tensor:
        count = len(step.tokens)
        bucket = next(size for size in sorted(self._recordings) if size >= count)
        host = self._host.numpy()
        host[:count, _TOKEN], host[:count, _LENGTH] = step.tokens, step.positions + 1
        host[count:bucket, _TOKEN], host[count:bucket, _LENGTH] = 0, 0
        host[count:bucket, _TABLE] = self.room.num_blocks
        for row, (_, _, start, table) in enumerate(step.sequences.tolist()):
            num_blocks = start // self.room.block_size + 1
            host[row, _TABLE : _TABLE + num_blocks] = step.tables[table : table + num_blocks]
        # Written again only after this step's tokens have been waited for.
        self._numbers[:bucket].copy_(self._host[:bucket], non_blocking=True)
        recording, logits = self._recordings[bucket]
        recording.replay()
        return logits[:count]


def _only_decodes(step: StepInput) -> bool:
    """Whether every sequence has one token, whose logits are wanted and nothing else."""
    counts = {len(step.tokens), len(step.sequences), len(step.sample_rows)}
    return len(counts) == 1 and not len(step.pooled_rows)
