#!/usr/bin/env python
"""Prefill and decode at once, each on one core: as threads of one process, and as two processes.

    python recipes/bench/serve_phases.py --rounds 3 --seconds 4

Milliseconds of a step of SmolLM2-135M in 8 bits: prefill in chunks of 256 of a prompt of 1,024,
decode of `--batch` sequences at context 192. First each alone, on one core and on two; then both at
once, each on a core of its own. The two ways alternate.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console

from toolkit.hardware.affinity import usable_cpus
from toolkit.models import weights as files
from toolkit.serve.batch import Batch, Slice
from toolkit.serve.executor.cpu import compute
from toolkit.serve.model import weights
from toolkit.serve.model.native import NativeDecoder
from toolkit.serve.model.quantisation import make_decoder
from toolkit.serve.request import Phase, Request, SamplingParams

_BLOCK, _CHUNK, _PROMPT, _CONTEXT = 16, 256, 1024, 192
console = Console(highlight=False)


class Work:
    """The model, its cache, and the batches of either phase over blocks of their own."""

    def __init__(self, batch: int) -> None:
        made = make_decoder(
            weights.load(files.resolve("smollm2-135m").path, keep_blocks=True), "int8"
        )
        assert isinstance(made, NativeDecoder)
        self.decoder = made
        each = _CONTEXT // _BLOCK
        self.cache = made.make_cache(_PROMPT // _BLOCK + batch * each, _BLOCK)
        prompt = self._request(_PROMPT, 0)
        self.batches = {
            Phase.PREFILL: [
                Batch(0, (Slice(prompt, Phase.PREFILL, start, start + _CHUNK),))
                for start in range(0, _PROMPT, _CHUNK)
            ],
            Phase.DECODE: [
                Batch(
                    0,
                    tuple(
                        Slice(
                            self._request(_CONTEXT, _PROMPT // _BLOCK + at * each),
                            Phase.DECODE, _CONTEXT - 1, _CONTEXT,
                        )
                        for at in range(batch)
                    ),
                )
            ],
        }  # fmt: skip

    @staticmethod
    def _request(length: int, first_block: int) -> Request:
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        blocks = list(range(first_block, first_block + length // _BLOCK))
        return Request("r", tuple(range(100, 100 + length)), params, block_ids=blocks)

    def go_on(
        self,
        phase: Phase,
        cpus: Sequence[int],
        seconds: float,
        ready: Any,
        tell: Callable[[Any], Any],
    ) -> None:
        """Compute steps of a phase on `cpus` for some seconds; tell what each took."""
        os.sched_setaffinity(0, cpus[:1])
        torch.set_num_threads(1)
        decoder, batches = self.decoder.twin(), self.batches[phase]
        decoder.start(len(cpus), cpus)
        for _ in range(3):
            compute(decoder, self.cache, batches[0])
        ready.wait()
        took: list[float] = []
        end_s = time.perf_counter() + seconds
        while time.perf_counter() < end_s:
            start_s = time.perf_counter()
            compute(decoder, self.cache, batches[len(took) % len(batches)])
            took.append(1e3 * (time.perf_counter() - start_s))
        tell((phase, statistics.median(took), sorted(took)[int(0.99 * len(took))]))


def in_threads(work: Work, places: dict[Phase, Sequence[int]], seconds: float) -> list[Any]:
    found: list[Any] = []
    ready = threading.Barrier(len(places))
    threads = [
        threading.Thread(target=work.go_on, args=(phase, cpus, seconds, ready, found.append))
        for phase, cpus in places.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def in_processes(work: Work, places: dict[Phase, Sequence[int]], seconds: float) -> list[Any]:
    """Forked, so that weights and cache, which are mapped memory, are not copied."""
    context = multiprocessing.get_context("fork")
    told, ready = context.Queue(), context.Barrier(len(places))
    processes = [
        context.Process(target=work.go_on, args=(phase, cpus, seconds, ready, told.put))
        for phase, cpus in places.items()
    ]
    for process in processes:
        process.start()
    found = [told.get() for _ in processes]
    for process in processes:
        process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    work, (first, second) = Work(options.batch), usable_cpus()[:2]
    together = {Phase.PREFILL: (first,), Phase.DECODE: (second,)}

    def show(how: str, found: list[Any]) -> None:
        said = (f"{phase.value} {median:.1f} (p99 {p99:.1f})" for phase, median, p99 in found)
        console.print(f"{how}: {', '.join(sorted(said))} ms")

    for _ in range(options.rounds):
        for phase in Phase:
            for cpus in ((first,), (first, second)):
                alone = in_threads(work, {phase: cpus}, options.seconds / 2)
                show(f"alone on {len(cpus)}", alone)
        show("two threads", in_threads(work, together, options.seconds))
        show("two processes", in_processes(work, together, options.seconds))


if __name__ == "__main__":
    main()
