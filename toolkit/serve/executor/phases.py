"""Two steps at once on CPU cores: a thread for each phase, on cores that the other does not use.

Both threads compute in one process, over one KV cache and one set of weights: the kernels run
outside the interpreter's lock and keep what a step needs per team of threads, so nothing is copied
or sent when a sequence passes from prefill to decode. Processes with shared memory were no faster:
docs/adr/0007-phases-are-threads.md has the measurement, and what threads cost.

Cores are numbered from prefill's end: a share of units [start, stop) is computed by the cores at
these places of `cpus`. Prefill's thread stays on the first of them and decode's on the last, so
that no layout moves a thread. For each size that a phase may be given there is a team of threads,
made at the start; those not computing sleep.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from toolkit import log
from toolkit.errors import UsageError
from toolkit.hardware.affinity import usable_cpus
from toolkit.hardware.share import Share
from toolkit.serve.batch import Batch, StepResult
from toolkit.serve.executor.base import StepLostError
from toolkit.serve.executor.cpu import compute
from toolkit.serve.model.cache import PagedKV
from toolkit.serve.model.native import NativeDecoder
from toolkit.serve.request import Phase
from toolkit.serve.split.layouts import Layout

logger = log.get_logger(__name__)

# How often whoever waits for a step looks whether its thread still lives.
_LOOK_S = 0.5
# What a step gets to end in when the executor is closed; after that its thread keeps the cache.
_CLOSE_S = 30.0


@dataclass(frozen=True, slots=True)
class _Ended:
    """A step's end: its result, or why there is none."""

    batch: Batch
    result: StepResult | BaseException


class _Crew:
    """One phase's thread and its teams, by number of cores."""

    def __init__(
        self,
        phase: Phase,
        cache: PagedKV,
        decoders: dict[int, NativeDecoder],
        cpus: Sequence[int],
        ended: queue.SimpleQueue[_Ended],
    ) -> None:
        """`cpus`, in the order this phase takes them; empty ties nothing to cores."""
        self.phase, self.cache, self.decoders, self.cpus = phase, cache, decoders, cpus
        self.batch: Batch | None = None
        self._orders: queue.SimpleQueue[tuple[Batch, int] | None] = queue.SimpleQueue()
        self._ended = ended
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, name=phase.value, daemon=True)

    def start(self) -> None:
        """Start the thread and its teams; returns when they are there."""
        self._thread.start()
        while not self._ready.wait(_LOOK_S):
            assert self._thread.is_alive(), f"the thread for {self.phase.value} did not start"

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def order(self, batch: Batch, size: int) -> None:
        """Have a batch computed on `size` cores."""
        assert self.batch is None, f"{self.phase.value} is computing already"
        self.batch = batch
        self._orders.put((batch, size))

    def stop(self, timeout_s: float) -> bool:
        """End the thread after its present step; return whether it has ended."""
        self._orders.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        if self.cpus:
            os.sched_setaffinity(0, self.cpus[:1])
        # What is drawn in torch is drawn here; a pool of its own would take the other's cores.
        torch.set_num_threads(1)
        for size, decoder in self.decoders.items():
            decoder.start(size, self.cpus[:size])
        self._ready.set()
        while (order := self._orders.get()) is not None:
            batch, size = order
            result: StepResult | BaseException
            try:
                result = compute(self.decoders[size], self.cache, batch)
            except BaseException as error:
                result = error
            self._ended.put(_Ended(batch, result))


class PhasedCpuExecutor:
    """A decoder on CPU cores that are divided between a step of prefill and a step of decode.

    A `ConcurrentExecutor` (split/engine.py). A thread that has ended is replaced, and what it was
    computing is told as lost.
    """

    def __init__(
        self,
        decoder: NativeDecoder,
        layouts: Iterable[Layout],
        *,
        num_blocks: int,
        block_size: int,
        threads: int,
        pin: bool = False,
    ) -> None:
        """`layouts` are all that will be asked for; `pin` ties threads to `threads` cores.

        Raises UsageError where `decoder` is not one whose teams can compute at once.
        """
        if not isinstance(decoder, NativeDecoder):
            raise UsageError(
                "phases compute at once on the compiled kernels only, and they are not there",
                remedy="install a C++ compiler, or serve undivided",
            )
        self.decoder, self.layouts = decoder, tuple(layouts)
        self.num_blocks, self.block_size, self.threads, self.pin = (
            num_blocks, block_size, threads, pin,
        )  # fmt: skip
        self.cache = decoder.make_cache(num_blocks, block_size)
        self.cpus: tuple[int, ...] = usable_cpus()[-threads:] if pin else ()
        self._ended: queue.SimpleQueue[_Ended] = queue.SimpleQueue()
        self._crews: dict[Phase, _Crew] = {}

    def start(self) -> None:
        """Start both phases' threads."""
        for phase in Phase:
            self._crews[phase] = self._hire(phase)

    def begin(self, batch: Batch, share: Share) -> None:
        """Start computing a batch on a share's cores; one of both phases is prefill's."""
        phases = {piece.phase for piece in batch.slices}
        phase = Phase.DECODE if phases == {Phase.DECODE} else Phase.PREFILL
        crew = self._crews[phase]
        if not crew.alive:
            logger.warning("the thread for %s has ended; another takes its place", phase.value)
            crew = self._crews[phase] = self._hire(phase)
        crew.order(batch, share.units)

    def wait(self) -> tuple[Batch, StepResult]:
        """Return the first batch to end and its result; raises StepLostError where it has none."""
        ended = self._next()
        for crew in self._crews.values():
            if crew.batch is ended.batch:
                crew.batch = None
        if isinstance(ended.result, BaseException):
            raise StepLostError(ended.batch, ended.result) from ended.result
        return ended.batch, ended.result

    def run(self, batch: Batch) -> StepResult:
        """Compute a batch on all cores; nothing else is in flight."""
        self.begin(batch, self.layouts[0].whole or self.layouts[0].prefill)
        return self.wait()[1]

    def successor(self) -> PhasedCpuExecutor:
        """Return an executor of the same weights with an empty cache."""
        return PhasedCpuExecutor(
            self.decoder,
            self.layouts,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            threads=self.threads,
            pin=self.pin,
        )

    def close(self) -> None:
        """End both threads and let go of the cache, unless one of them still writes to it."""
        ended = [crew.stop(_CLOSE_S) for crew in self._crews.values()]
        self._crews = {}
        if all(ended):
            self.cache.clear()

    def _next(self) -> _Ended:
        while True:
            try:
                return self._ended.get(timeout=_LOOK_S)
            except queue.Empty:
                for crew in self._crews.values():
                    if crew.batch is not None and not crew.alive and self._ended.empty():
                        cause = RuntimeError(f"the thread for {crew.phase.value} has ended")
                        return _Ended(crew.batch, cause)

    def _hire(self, phase: Phase) -> _Crew:
        sizes = {self.threads, *(layout.of(phase).units for layout in self.layouts)}
        cpus = self.cpus if phase is Phase.PREFILL else self.cpus[::-1]
        decoders = {size: self.decoder.twin() for size in sorted(sizes)}
        crew = _Crew(phase, self.cache, decoders, cpus, self._ended)
        crew.start()
        return crew
