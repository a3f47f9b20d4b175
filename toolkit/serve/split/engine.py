"""The divided engine: one loop, and each phase begins a step of its own whenever it has none.

    decide the layout -> begin what may begin -> wait for the first to end -> postprocess

One thread, one scheduler, one KV pool, two steps in flight. A phase takes up a new layout when its
own step is over, and never units that the other still computes on: who grows waits until the other
has shrunk, on its old units if those are free (Nexus's buffered switch, arXiv 2507.06608 section
4.3, without its overlap). A phase with nothing beside it has the whole device. Undivided steps
begin when nothing is in flight any more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from toolkit import log
from toolkit.hardware.share import Share
from toolkit.serve.batch import Batch, StepResult
from toolkit.serve.clock import Clock
from toolkit.serve.engine import Divided, Engine, StepReport
from toolkit.serve.executor.base import StepLostError
from toolkit.serve.journal import Journal
from toolkit.serve.request import Phase, Status
from toolkit.serve.scheduler import BOTH, Scheduler
from toolkit.serve.split.controller import Controller, Decision
from toolkit.serve.split.layouts import Layout
from toolkit.serve.split.weighing import Situation
from toolkit.serve.split.work import Load
from toolkit.timeline import Span, Timeline

logger = log.get_logger(__name__)

# As often may a kind of step be lost, one after another, before the engine is not to be trusted.
_MOST_LOST = 2
_KEPT_PREDICTIONS = 20_000


class ConcurrentExecutor(Protocol):
    """Computes up to two batches at once, of different phases, on units that do not overlap.

    What `Executor.run` must do holds for each of them.
    """

    def start(self) -> None:
        """Make ready in the thread that will call the others."""
        ...

    def begin(self, batch: Batch, share: Share) -> None:
        """Start computing a batch on a share; returns at once."""
        ...

    def wait(self) -> tuple[Batch, StepResult]:
        """Return the batch that ends first of those begun, and its result.

        Raises StepLostError for one that has none; the other may still be in flight.
        """
        ...

    def run(self, batch: Batch) -> StepResult:
        """Compute a batch on the whole device while nothing else is in flight."""
        ...

    def successor(self) -> ConcurrentExecutor:
        """Return an executor of the same model with an empty cache and nothing in flight."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


@dataclass(frozen=True, slots=True)
class Flight:
    """A step under way. `phase` is None for one that holds both."""

    batch: Batch
    phase: Phase | None
    share: Share
    load: Load
    start_s: float
    model_s: float


class DividedEngine(Engine):
    """An engine whose phases have steps of their own, laid out by a controller."""

    executor: ConcurrentExecutor

    def __init__(
        self,
        scheduler: Scheduler,
        executor: ConcurrentExecutor,
        clock: Clock,
        controller: Controller,
        *,
        journal: Journal | None = None,
        seed: int = 0,
    ) -> None:
        """See Engine; `controller` chooses the layouts."""
        super().__init__(scheduler, executor, clock, journal=journal, seed=seed)
        self.controller = controller
        self.num_steps: Counter[str] = Counter()
        self.num_lost = 0
        self._lost_in_a_row: Counter[Phase | None] = Counter()
        # By step, in the order of their ends.
        self._predicted: dict[int, float] = {}
        self._flights: dict[Phase | None, Flight] = {}
        self._held: dict[Phase, Share] = {}

    def successor(self) -> DividedEngine:
        """Return an engine like this one with nothing in it; what the controller learnt stays."""
        return DividedEngine(
            self.scheduler.successor(),
            self.executor.successor(),
            self.clock,
            self.controller,
            journal=self.journal,
            seed=self._random.getrandbits(63),
        )

    def step(self) -> StepReport:
        """Begin what may begin, and see the first step in flight to its end; report it.

        A step that is lost is taken back, and computed again by a later one: its report has no
        outputs. Raises StepLostError when that does not help.
        """
        self._launch(self.clock.now())
        try:
            batch, result = self.executor.wait()
        except StepLostError as error:
            return self._take_back(error)
        end_s = self.clock.now()
        flight = self._landed(batch)
        self._lost_in_a_row[flight.phase] = 0
        self._collect(batch, result)
        took_s = end_s - flight.start_s
        drawn = self.scheduler.update(batch, result.token_ids, end_s, took_s)
        predicted_s = self.controller.observe(flight.phase, flight.model_s, took_s)
        self._predicted[batch.step] = predicted_s
        if len(self._predicted) > _KEPT_PREDICTIONS:
            self._predicted.pop(next(iter(self._predicted)))
        report = self._postprocess(batch, result, drawn, flight.start_s, end_s)
        return replace(report, divided=Divided(flight.phase, flight.share.units, predicted_s))

    @property
    def in_flight_since_s(self) -> float | None:
        """When the oldest step in flight began. Safe to ask from another thread."""
        return min((one.start_s for one in list(self._flights.values())), default=None)

    def _landed(self, batch: Batch) -> Flight:
        flight = next(one for one in self._flights.values() if one.batch is batch)
        del self._flights[flight.phase]
        return flight

    def _take_back(self, error: StepLostError) -> StepReport:
        flight = self._landed(error.batch)
        self.scheduler.cancel(error.batch)
        self.num_lost += 1
        self._lost_in_a_row[flight.phase] += 1
        if self._lost_in_a_row[flight.phase] > _MOST_LOST:
            raise error
        logger.warning("%s; it is computed again", error, exc_info=error.__cause__)
        divided = Divided(flight.phase, flight.share.units, None, lost=True)
        return StepReport((), 0, 0, flight.start_s, self.clock.now(), divided)

    def timeline(self, title: str = "serving") -> Timeline:
        """Return the engine's recent steps and requests, and on a track `layout` what held when.

        A layout's span says in its detail why it was chosen. Beside a measured step lies what was
        predicted of it, from the same moment on. Safe to call from another thread.
        """
        found = super().timeline(title)
        predicted = dict(self._predicted)
        end_s = max((span.end_s for span in found.spans), default=0.0)
        changes = list(self.controller.history)
        ends = [*(after.since_s for after in changes[1:]), max(end_s, changes[-1].since_s)]
        spans = tuple(
            Span(
                str(one.layout), "layout", one.since_s, until_s, self.journal.source, "layout",
                {"why": one.reason, "mode": one.mode.value},
            )
            for one, until_s in zip(changes, ends, strict=True)
            if until_s > one.since_s
        )  # fmt: skip
        if self.journal.source == "measured":
            found = replace(found, spans=found.spans + tuple(_foretold(found, predicted)))
        return replace(found, spans=spans + found.spans)

    def _launch(self, now: float) -> None:
        decision = self.controller.decide(self.situation, now)
        layout = decision.layout
        if layout.undivided and not self._flights:
            batch = self.scheduler.schedule(now, BOTH, beside_tokens=decision.chunk)
            self._begin(batch, _kind(batch), layout.prefill, now)
            return
        # Prefill's end is when an engine becomes undivided: decode goes on until then.
        wanted = BOTH if not layout.undivided else self._until_mixed()
        begun: list[tuple[Phase, Batch, Share]] = []
        for phase in wanted:
            share = None if phase in self._flights else self._share(phase, layout)
            if share is None:
                continue
            batch = self.scheduler.schedule(now, (phase,))
            if batch:
                begun.append((phase, batch, share))
        lone = layout.whole if len(begun) == 1 and not self._flights else None
        for phase, batch, share in begun:
            self._begin(batch, phase, lone or share, now)
        assert self._flights, "nothing is in flight and nothing could begin"

    def _until_mixed(self) -> Collection[Phase]:
        return (Phase.DECODE,) if Phase.PREFILL in self._flights else ()

    def _share(self, phase: Phase, layout: Layout) -> Share | None:
        """The units a phase may begin on: the layout's, else its last ones, else none yet."""
        held = self._held.get(phase)
        wanted = [held] if layout.undivided else [layout.of(phase), held]
        for share in wanted:
            if share is not None and not any(
                share.overlaps(flight.share) for flight in self._flights.values()
            ):
                return share
        return None

    def _begin(self, batch: Batch, phase: Phase | None, share: Share, now: float) -> None:
        load = Load.of(batch.slices)
        if phase is None:
            loads = {each: Load.of(batch.of(each)) for each in BOTH}
        else:
            loads = {one.phase: one.load for one in self._flights.values() if one.phase}
            loads[phase] = load
            if share != self.whole(share):
                self._held[phase] = share
        model_s = self.controller.predict(loads, phase, share.fraction)
        self.num_steps["mixed" if phase is None else phase.value] += 1
        try:
            self.executor.begin(batch, share)
        except BaseException:
            self.scheduler.cancel(batch)
            raise
        self._flights[phase] = Flight(batch, phase, share, load, now, model_s)

    @staticmethod
    def whole(share: Share) -> Share:
        """Return the whole device that a share is of."""
        return Share.whole(share.device)

    def situation(self) -> Situation:
        """Return what is in flight, or else coming, of either phase."""
        scheduler = self.scheduler
        budget = scheduler.config.step_tokens
        loads = {one.phase: one.load for one in self._flights.values()}
        prefill, waiting = Load(), scheduler.queue.num_requests
        decoding = context = 0
        for request in scheduler.running:
            if request.status is Status.FINISHED:
                continue
            if request.phase is Phase.DECODE:
                decoding += 1
                context += request.num_computed + 1
                continue
            waiting += 1
            num = min(request.num_pending, budget - prefill.tokens)
            if num > 0:
                prefill += Load.chunk(request.num_computed, request.num_computed + num)
        prefill += _from_queue(scheduler, budget - prefill.tokens)
        return Situation(
            prefill=loads.get(Phase.PREFILL) or prefill,
            decode=loads.get(Phase.DECODE) or Load.decoding(decoding, context),
            waiting=waiting,
            decoding=decoding,
            kv_usage=scheduler.pool.usage,
        )


def _from_queue(scheduler: Scheduler, budget: int) -> Load:
    """What the queue would put into a chunk of `budget` tokens: its head, then average prompts."""
    queue, head = scheduler.queue, scheduler.queue.head()
    if head is None or budget <= 0 or len(scheduler.running) >= scheduler.config.max_batch:
        return Load()
    first, cached = head[1], head[1].num_reusable
    num = min(budget, max(1, first.num_tokens - cached))
    load = Load.chunk(cached, cached + num)
    others = queue.num_requests - 1
    left = min(budget - num, queue.num_tokens - first.num_tokens)
    if others and left > 0:
        mean = max(1, (queue.num_tokens - first.num_tokens) // others)
        whole = Load.chunk(0, min(mean, left))
        times = -(-left // whole.tokens)
        load += Load(times, left, left, left * whole.pairs // whole.tokens, times)
    return load


def _foretold(found: Timeline, predicted: Mapping[int, float]) -> Iterator[Span]:
    """What each step was predicted to take, as spans that begin when it did."""
    for span in found.spans:
        took_s = predicted.get(span.detail.get("step", -1))
        if took_s is not None:
            yield replace(span, end_s=span.start_s + took_s, source="predicted")


def _kind(batch: Batch) -> Phase | None:
    """The one phase of a batch, or None where it holds both."""
    phases = {piece.phase for piece in batch.slices}
    return phases.pop() if len(phases) == 1 else None


__all__ = ["ConcurrentExecutor", "Decision", "DividedEngine", "Flight"]
