"""The engines of a simulation: the live loops, which besides can take many decode steps at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, cast

from toolkit.hardware.share import Share
from toolkit.serve.batch import Batch
from toolkit.serve.engine import Engine
from toolkit.serve.executor.simulated import Ahead, SimulatedExecutor
from toolkit.serve.request import Phase
from toolkit.serve.scheduler import Scheduler
from toolkit.serve.simulate.leap import DecodeRun, Join, Leap, OnEnd
from toolkit.serve.split import along
from toolkit.serve.split.engine import DividedEngine
from toolkit.serve.split.predictor import Predictor
from toolkit.serve.split.weighing import Situation
from toolkit.serve.split.work import Load


class UndividedEngine(Engine):
    """The live loop, for steps that hold both phases."""

    # How often a step of decoding asks the scheduler what to compute.
    asks: ClassVar[int] = 1

    def leap(self, until_s: float, on_end: OnEnd, join: Join) -> Leap | None:
        """Take many steps at once; see `Leaping`."""
        scheduler, begin_s = self.scheduler, self.clock.now()
        if not scheduler.running or not scheduler.only_decodes(begin_s):
            return None
        executor = cast("SimulatedExecutor", self.executor)
        run = DecodeRun(
            scheduler,
            executor,
            Share.whole(executor.cost.device),
            until_s=min(until_s, _until(scheduler, begin_s)),
            ends_run=bool(scheduler.queue.num_requests),
            on_end=on_end,
        )
        return _noted(self, run.take(), begin_s, self.asks)


class PrefillFirstEngine(UndividedEngine):
    """Computes prompts alone as long as there are any, then decodes: no step holds both."""

    asks: ClassVar[int] = 2

    def _schedule(self, now: float) -> Batch:
        batch = self.scheduler.schedule(now, (Phase.PREFILL,))
        return batch or self.scheduler.schedule(now, (Phase.DECODE,))


class SplitEngine(DividedEngine):
    """The live loop, for a step of either phase in flight."""

    def leap(self, until_s: float, on_end: OnEnd, join: Join) -> Leap | None:
        """Take many steps of decoding at once, alone or beside a step of prefill."""
        scheduler, controller, begin_s = self.scheduler, self.controller, self.clock.now()
        if not scheduler.running or Phase.DECODE in self._flights or None in self._flights:
            return None
        beside = self._flights.get(Phase.PREFILL)
        if beside is None and not scheduler.only_decodes(begin_s):
            return None
        layout = controller.decide(self.situation, begin_s).layout
        if beside is None:
            share: Share | None = layout.whole or layout.decode
        else:
            share = self._share(Phase.DECODE, layout)
        if share is None:
            return None
        waiting = bool(scheduler.queue.num_requests) and beside is None
        if waiting and not controller.rests(begin_s):
            return None
        prefilling = sum(request.phase is Phase.PREFILL for request in scheduler.running)

        def look(now: float, num: int, context: int) -> bool:
            """Let the controller look as it would have; return whether the layout stays."""
            if waiting:
                return False
            found = Situation(
                prefill=Load() if beside is None else beside.load,
                decode=Load.decoding(num, context),
                waiting=prefilling + scheduler.queue.num_requests,
                decoding=num,
                kv_usage=scheduler.pool.usage,
            )
            return controller.decide(lambda: found, now).layout is layout

        predictor = cast("Predictor", controller)
        loads = {} if beside is None else {Phase.PREFILL: beside.load}
        part = share.fraction

        foreseen: tuple[Ahead | None, list[float]] = (None, [])

        def observe(found: Ahead, first: int, took_s: Sequence[float]) -> None:
            nonlocal foreseen
            if foreseen[0] is not found:
                model_s, other = found.alone.seconds, predictor.beside(loads, part)
                if other is not None and other == found.other and found.beside_s is not None:
                    model_s = found.beside_s
                elif other is not None:
                    model_s = along.beside(found.alone, other, predictor.cost.bandwidth)
                foreseen = (found, model_s.tolist())
            num = len(took_s)
            learnt = predictor.corrections[Phase.DECODE]
            learnt.observe_run(foreseen[1][first : first + num], took_s)
            self.num_steps[Phase.DECODE.value] += num
            if share != self.whole(share):
                self._held[Phase.DECODE] = share

        run = DecodeRun(
            scheduler,
            cast("SimulatedExecutor", self.executor),
            share,
            until_s=min(until_s, _until(scheduler, begin_s)) if waiting else until_s,
            ends_run=waiting,
            on_end=on_end,
            join=None if beside is None else join,
            rests=controller.rests,
            look=look,
            observe=observe,
        )
        asks = 1 if beside is not None or layout.undivided else 2
        return _noted(self, run.take(), begin_s, asks)


def _until(scheduler: Scheduler, now: float) -> float:
    """Until when the order of those that wait is what it is now."""
    change_s = scheduler.prefill_policy.next_change(now) if scheduler.queue.num_requests else None
    return math.inf if change_s is None else change_s


def _noted(engine: Engine, leap: Leap | None, begin_s: float, asks: int) -> Leap | None:
    """Count a leap's steps, and write it into the journal as one."""
    if leap is None:
        return None
    scheduler = engine.scheduler
    scheduler.count_steps(asks * len(leap.ends_s))
    engine.journal.step(
        leap.batch(scheduler.num_steps),
        begin_s,
        leap.ends_s[-1],
        num_waiting=scheduler.queue.num_requests,
        kv_usage=scheduler.pool.usage,
    )
    for request, _, _ in leap.drawn:
        if request.finish_reason is not None:
            engine.journal.finished(request)
    return leap
