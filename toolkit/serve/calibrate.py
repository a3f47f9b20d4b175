"""Measures steps of a real model on this device, for `split/calibration.py` to fit.

Steps are made up: chunks of prompts and decoding sequences over blocks of the engine's own cache,
computed by its own executor on every size of share, alone, mixed and side by side. What the tokens
are does not matter to how long they take.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from toolkit.errors import InfeasibleError
from toolkit.hardware.share import Share
from toolkit.serve.batch import Batch, Slice
from toolkit.serve.executor.phases import PhasedCpuExecutor
from toolkit.serve.request import Phase, Request, SamplingParams
from toolkit.serve.split import layouts
from toolkit.serve.split.calibration import Point
from toolkit.serve.split.layouts import Layout
from toolkit.serve.split.work import Load

_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_CONTEXTS = (48, 256, 1024)
_STARTS = (0, 512, 1536)
_CHUNKS = (16, 64, 128, 256, 512)
# Of many sizes of a share so many are measured; the curve between them is fitted.
_MOST_SIZES = 4


@dataclass(frozen=True)
class _Trial:
    """What is to be measured: a batch on a share, and what runs beside it all the while."""

    batch: Batch
    share: Share
    beside: Batch | None = None
    beside_share: Share | None = None


class Bench:
    """An executor and the blocks of its cache, of which it makes batches."""

    def __init__(
        self, executor: PhasedCpuExecutor, *, max_batch: int, step_tokens: int, max_context: int
    ) -> None:
        """The limits are the engine's. `executor` is started, and used by nobody else."""
        self.executor = executor
        self.max_batch, self.step_tokens = max_batch, step_tokens
        self.max_context = max_context
        device = executor.layouts[0].prefill.device
        self._whole = Share.whole(device)
        try:
            cuts = layouts.divided(device)
        except InfeasibleError:
            cuts = ()
        self._cuts = _spread(cuts)

    def trials(self) -> list[_Trial]:
        """Return everything to be measured."""
        found = [
            _Trial(batch, share)
            for phase, batches in ((Phase.PREFILL, self._chunks()), (Phase.DECODE, self._decodes()))
            for batch in batches
            for share in self._shares(phase)
        ]
        chunks, decodes = list(self._chunks()), list(self._decodes())
        for chunk, decode in zip(itertools.cycle(chunks), decodes, strict=False):
            if chunk.num_tokens + decode.num_tokens <= self.step_tokens + self.max_batch:
                found.append(_Trial(Batch(0, (*decode.slices, *chunk.slices)), self._whole))
        # Beside each other: the longer step goes on all the while the shorter ones are timed.
        long, busy = [c for c in chunks if c.num_tokens >= 64], decodes[1::2]
        for number, (chunk, decode) in enumerate(zip(itertools.cycle(long), busy, strict=False)):
            if not self._cuts:
                break
            cut = self._cuts[number % len(self._cuts)]
            found.append(_Trial(decode, cut.decode, chunk, cut.prefill))
            found.append(_Trial(chunk, cut.prefill, decode, cut.decode))
        return found

    def measure(self, trial: _Trial, *, seconds: float = 0.15) -> Point:
        """Return the median of a trial's steps; at least three of them, and some seconds' worth."""
        took: list[float] = []
        executor = self.executor
        if trial.beside is not None and trial.beside_share is not None:
            executor.begin(trial.beside, trial.beside_share)
        for number in itertools.count():
            started_s = time.perf_counter()
            executor.begin(trial.batch, trial.share)
            while executor.wait()[0] is not trial.batch:
                assert trial.beside is not None
                assert trial.beside_share is not None
                executor.begin(trial.beside, trial.beside_share)
            if number:  # the first one warms
                took.append(time.perf_counter() - started_s)
            if len(took) >= 3 and sum(took) >= seconds:
                break
        if trial.beside is not None:
            executor.wait()
        return Point(
            prefill=Load.of(trial.batch.of(Phase.PREFILL)),
            decode=Load.of(trial.batch.of(Phase.DECODE)),
            units=trial.share.units,
            seconds=statistics.median(took),
            beside=None if trial.beside is None else Load.of(trial.beside.slices),
        )

    def run(self, on_done: Callable[[], None], *, seed: int = 0) -> list[Point]:
        """Return all points, measured in random order: a slow minute must not fall on one kind."""
        trials = self.trials()
        random.Random(seed).shuffle(trials)
        found = []
        for trial in trials:
            found.append(self.measure(trial))
            on_done()
        return found

    def _shares(self, phase: Phase) -> Iterator[Share]:
        yield self._whole
        yield from (cut.of(phase) for cut in self._cuts)

    def _chunks(self) -> Iterator[Batch]:
        sizes = {min(size, self.step_tokens) for size in _CHUNKS}
        for size, start in itertools.product(sorted(sizes), _STARTS):
            if start + size <= min(self.max_context, self._capacity):
                request = self._request(start + size, 0)
                yield Batch(0, (Slice(request, Phase.PREFILL, start, start + size),))

    def _decodes(self) -> Iterator[Batch]:
        # Beside a chunk: its blocks are another's.
        taken = -(-max(self._ends()) // self.executor.block_size)
        for size, context in itertools.product(_BATCHES, _CONTEXTS):
            each = -(-context // self.executor.block_size)
            free = self.executor.num_blocks - taken
            if size > self.max_batch or context > self.max_context or size * each > free:
                continue
            requests = [self._request(context, taken + at * each) for at in range(size)]
            yield Batch(0, tuple(Slice(r, Phase.DECODE, context - 1, context) for r in requests))

    def _ends(self) -> list[int]:
        return [batch.slices[0].end for batch in self._chunks()]

    @property
    def _capacity(self) -> int:
        # A quarter is for those decoding beside.
        return self.executor.num_blocks * self.executor.block_size * 3 // 4

    def _request(self, length: int, first_block: int) -> Request:
        num_blocks = -(-length // self.executor.block_size)
        blocks = list(range(first_block, first_block + num_blocks))
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        return Request("calibration", (1,) * length, params, block_ids=blocks)


def _spread(cuts: tuple[Layout, ...]) -> tuple[Layout, ...]:
    """Return at most a few of the cuts, from one end to the other."""
    if len(cuts) <= _MOST_SIZES:
        return cuts
    last = len(cuts) - 1
    return tuple(cuts[round(at * last / (_MOST_SIZES - 1))] for at in range(_MOST_SIZES))
