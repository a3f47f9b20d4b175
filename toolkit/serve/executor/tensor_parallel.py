"""Tensor parallelism: the first rank schedules and samples, the others compute what it tells them.

Every rank holds its part of the weights and of the KV cache. The first is this process; it starts
the others on this machine, hands them every step's numbers through a pipe, and all meet in the sums
of each layer. A rank that ends is noticed, whoever waits for it is told, and a successor starts
all of them anew.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from toolkit.errors import ToolkitError
from toolkit.hardware.affinity import thread_environment
from toolkit.serve.batch import Batch, StepResult
from toolkit.serve.executor.device import DeviceExecutor, Recording, Room
from toolkit.serve.model.device import DeviceDecoder
from toolkit.serve.model.inputs import StepInput
from toolkit.serve.model.part import Part
from toolkit.serve.model.ranks import Ranks, meeting_place

# How long a rank may take to end of the cause that ended a sum, before another is looked for.
_SETTLE_S = 2.0
# How long ranks may take to end by themselves when their pipe closes.
_GRACE_S = 5.0


@dataclass(frozen=True)
class Orders:
    """What a rank is told first: what to load, where to run it, and where to meet the others."""

    source: Path
    part: Part
    device: str
    dtype: torch.dtype
    room: Room
    threads: int
    port: int = 0

    @property
    def ready(self) -> str:
        """The key under which the rank says at the meeting place that its part is loaded."""
        return f"loaded/{self.part.rank}"


class Followers:
    """The processes of all ranks but the first."""

    def __init__(self, orders: Orders, on_loss: Callable[[], None]) -> None:
        """Start them and wait until each has loaded its part; `on_loss` hears when one ends."""
        self.store = meeting_place()
        self._ending = False
        self._on_loss = on_loss
        all_orders = [
            replace(orders, part=replace(orders.part, rank=rank), port=self.store.port)
            for rank in range(1, orders.part.degree)
        ]
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "toolkit.serve.executor.follower"],
                stdin=subprocess.PIPE,
                env={**os.environ, **thread_environment(orders.threads)},
            )
            for _ in all_orders
        ]
        try:
            for process, each in zip(self._processes, all_orders, strict=True):
                self._send(process, each)
            while not self.store.check([each.ready for each in all_orders]):
                self.check()
                time.sleep(0.02)
        except BaseException:
            self.end()
            raise
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    def tell(self, step: StepInput | None) -> None:
        """Hand a step to every rank; None comes first and starts it. Raises ToolkitError where one
        has ended.
        """
        self.check()
        for process in self._processes:
            self._send(process, step)

    def check(self) -> None:
        """Raise ToolkitError if a rank has ended, saying which and how."""
        for rank, process in enumerate(self._processes, 1):
            code = process.poll()
            if code is not None:
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else "failed"
                raise ToolkitError(
                    f"rank {rank} of {len(self._processes) + 1} {how}",
                    remedy="what it said is in the server's log",
                )

    def blame(self) -> None:
        """Raise as `check` does for a rank that is just ending."""
        deadline = time.monotonic() + _SETTLE_S
        while time.monotonic() < deadline:
            self.check()
            time.sleep(0.02)

    def end(self, grace_s: float = _GRACE_S) -> None:
        """Close the pipes, and kill who has not ended by itself after `grace_s`."""
        self._ending = True
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        deadline = time.monotonic() + grace_s
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _send(self, process: subprocess.Popen[bytes], what: object) -> None:
        assert process.stdin is not None
        try:
            pickle.dump(what, process.stdin)
            process.stdin.flush()
        except (OSError, ValueError):
            self.blame()
            raise

    def _watch(self) -> None:
        while not self._ending and all(process.poll() is None for process in self._processes):
            time.sleep(0.1)
        if not self._ending:
            self._on_loss()


class TensorParallelExecutor(DeviceExecutor):
    """The first rank: a device's executor that has every step computed by all ranks."""

    def __init__(
        self,
        decoder: DeviceDecoder,
        orders: Orders,
        *,
        recorder: Callable[[], Recording] | None = None,
    ) -> None:
        """Start the other ranks. Raises ToolkitError where one cannot load its part.

        `orders` are what they are told; the decoder holds the first rank's part.
        """
        super().__init__(decoder, orders.room, recorder=recorder, threads=orders.threads)
        self._orders = orders
        self._followers: Followers | None = None
        self._meet()

    def start(self) -> None:
        """As without ranks; a successor starts its ranks here."""
        followers = self._followers or self._meet()
        # They record as this one does, and meet in the sums of it.
        followers.tell(None)
        super().start()

    def run(self, batch: Batch) -> StepResult:
        """As without ranks. Raises ToolkitError naming the rank that ended."""
        assert self._followers is not None, "start() comes first"
        try:
            return super().run(batch)
        except RuntimeError:
            # A sum that failed: most likely because somebody in it is gone.
            self._followers.blame()
            raise

    def compute(self, step: StepInput) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute a step on every rank; what is returned is whole."""
        assert self._followers is not None, "start() comes first"
        self._followers.tell(step)
        return super().compute(step)

    def successor(self) -> TensorParallelExecutor:
        """Return an executor whose ranks are started anew; those of this one are ended."""
        if self._followers is not None:
            # They may hang, and whoever asks for a successor should not wait for that.
            self._followers.end(grace_s=0.0)
        self.close()
        made = copy.copy(self)
        # Whoever still waits in this one's sums keeps its own group.
        made.decoder, made._followers = copy.copy(self.decoder), None
        made._allocate()
        return made

    def close(self) -> None:
        """End the other ranks and let go of the cache."""
        if self._followers is not None:
            self._followers.end()
        super().close()

    def _meet(self) -> Followers:
        self._followers = found = Followers(self._orders, self._abandon)
        self.decoder.ranks = Ranks(found.store, self._orders.part, self.decoder.device)
        return found

    def _abandon(self) -> None:
        # A CPU's sums fail by themselves when a rank's connection closes; a GPU's would wait.
        if self.decoder.device.type == "cuda" and self.decoder.ranks is not None:
            self.decoder.ranks.abandon()
