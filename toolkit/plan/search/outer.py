"""The outer search: meshes, microbatches, schedules, ways of parameters, recomputation.

    for known splits, then splits searched, then those that hold less:
        for each mesh and microbatch, most promising first:
            lay out the blocks -> price the items -> for each schedule and way of parameters:
            cut into stages -> estimate -> keep what nothing beats

A ground whose bound is beaten is not looked at. The search can stop at any time with what it has;
what takes least to lay out comes first: little time finds most, and what is found prunes the rest.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from toolkit.cost.calibration import Calibration
from toolkit.errors import InfeasibleError
from toolkit.hardware import Cluster
from toolkit.plan.search import host, schedules
from toolkit.plan.search.bench import LEAN, SEARCHED, WHOLE, Bench
from toolkit.plan.search.choice import Weights
from toolkit.plan.search.constraints import Constraints
from toolkit.plan.search.frontier import Frontier
from toolkit.plan.search.rows import Rows
from toolkit.plan.search.site import Mesh
from toolkit.plan.search.space import Ground, Space
from toolkit.plan.search.stack import Layouts
from toolkit.plan.search.trial import Split, Trials
from toolkit.plan.subject import Subject

# Of grounds that cannot be faster than the best, so many are looked at as may hold less, and none
# whose bound is this much above the best.
FAR = 1.5
_SLOWER = 6
# Of grounds that fit with the host alone, so many, where something fits without.
_HOSTED = 4
# Per sample a microbatch that fills a device takes at most this much more than the largest.
_FILLED = 1.02
# A leaner layout this much slower than the best is not followed by one in between.
_CLOSE = 1.2
# Seconds HiGHS has for a block.
_BLOCK_LIMIT_S = 3.0

Progress = Callable[[str, float | None], None]


class _Waiting(NamedTuple):
    """A ground that waits to be looked at: no plan on it is faster, or holds less, than this."""

    bound_s: float
    least_bytes: float
    ground: Ground


@dataclass
class Outer:
    """A search in progress."""

    subject: Subject
    cluster: Cluster
    num_ranks: int
    limit_bytes: float
    constraints: Constraints
    calibration: Calibration | None
    deadline: float
    progress: Progress
    pruned: int = 0
    stopped: bool = False
    shared: Bench | None = None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.bench = self.shared or Bench(
            self.subject, self.cluster, self.num_ranks, self.constraints, self.calibration
        )
        self.outline = self.bench.outline
        self.space = Space(
            self.cluster, self.num_ranks, self.subject.batch, len(self.outline.blocks),
            self.constraints,
            **({"most_context": self.num_ranks} if self.outline.num_passes > 1 else {}),
        )  # fmt: skip
        self.trials = Trials(self.bench, self.space, self.limit_bytes)
        devices = (self.cluster.device(rank) for rank in range(self.num_ranks))
        self._most_bytes = min(self.limit_bytes, max(one.memory_bytes for one in devices))

    @property
    def frontier(self) -> Frontier:
        return self.trials.frontier

    # The loop -------------------------------------------------------------------------------

    def run(self) -> None:
        """Search until everything is looked at or left out, or time is up."""
        grounds = sorted(
            _Waiting(*self.bound(ground), ground)
            for ground in self.space.grounds()
            if self._worth(ground)
        )
        self.pruned += sum(1 for _ in self.space.grounds()) - len(grounds)
        if not grounds:
            raise InfeasibleError(
                f"no plan of {self.subject.model} for {self.num_ranks} devices of "
                f"{self.cluster.name}: {self.space.why_empty()}",
                remedy="change the batch, the number of ranks, or the constraints",
            )
        possible = [one for one in grounds if one.least_bytes <= self._most_bytes]
        self.pruned += len(grounds) - len(possible)
        tight: list[_Waiting] = []
        slower: list[Ground] = []
        self._known(possible)
        self._searched(possible, tight, slower)
        self._leaner(tight)
        # Where nothing can fit, what is nearest to it is told.
        for one in sorted(grounds, key=lambda one: one.least_bytes):
            if self.trials.considered:
                break
            self.look_at(one.ground)
        # What cannot be faster may hold less: the frontier's other end.
        for ground in slower[:_SLOWER]:
            if self.out_of_time():
                return
            self._tell(ground)
            self.look_at(ground, FAR)
        self._with_host()

    def _known(self, grounds: Sequence[_Waiting]) -> None:
        """Look at all grounds with operators whole, or split as is known. Where one does not fit,
        the same mesh with its smallest microbatches is next: there is something soon.
        """
        smallest: dict[Mesh, _Waiting] = {}
        for one in grounds:
            known = smallest.setdefault(one.ground.mesh, one)
            if one.ground.num_samples < known.ground.num_samples:
                smallest[one.ground.mesh] = one
        looked: set[Ground] = set()
        for first in grounds:
            for one in (first, smallest[first.ground.mesh]):
                if self.out_of_time():
                    return
                if one.ground in looked:
                    continue
                if self._beaten(one):
                    self.pruned += one is first and not one.ground.mesh.inner > 1
                    continue
                looked.add(one.ground)
                self._tell(one.ground)
                if self.trials.look_at(one.ground, self._usual(one.ground)):
                    break

    def _searched(
        self, grounds: Sequence[_Waiting], tight: list[_Waiting], slower: list[Ground]
    ) -> None:
        """Look at grounds with operators split as the inner search finds. The one with the lowest
        bound is next; the first time its operators are laid out, and it waits again with the bound
        that their communication gives. `tight` gets those where memory ran out.
        """
        if not self._searches_splits:
            return
        waiting = [one for one in grounds if one.ground.mesh.inner > 1]
        heapq.heapify(waiting)
        laid_out: dict[Ground, Layouts] = {}
        while waiting and not self.out_of_time():
            one = heapq.heappop(waiting)
            ground = one.ground
            if self._beaten(one):
                self.pruned += 1
                best = self.frontier.best
                if ground in laid_out and best and one.bound_s < FAR * best.step_s:
                    slower.append(ground)
                continue
            self._tell(ground)
            if ground not in laid_out:
                found = self._fastest(ground)
                if found is None:
                    continue
                laid_out[ground] = found
                bound_s = max(one.bound_s, self._laid_out_s(ground, found))
                one = one._replace(bound_s=bound_s)
                if waiting and self._beaten(one, waiting[0].bound_s):
                    heapq.heappush(waiting, one)
                    continue
            split = Split(SEARCHED, laid_out[ground], self.bench.stack(ground))
            if not self.trials.look_at(ground, [split]):
                tight.append(one)

    def _leaner(self, grounds: Sequence[_Waiting]) -> None:
        """Look at grounds where memory ran out with operators split to hold less."""
        for one in sorted(grounds):
            if self.out_of_time():
                return
            if not self._beaten(one):
                self._tell(one.ground)
                self.trials.look_at(one.ground, self._lean(one.ground))

    def _beaten(self, one: _Waiting, than_s: float = math.inf) -> bool:
        """Whether the best, or `than_s`, is below all that a ground can reach."""
        best = self.frontier.best
        return one.bound_s > min(than_s, best.step_s if best is not None else math.inf)

    def _worth(self, ground: Ground) -> bool:
        """Whether microbatches this large may fit, and a pipeline could gain by them: of more than
        fill a device, fewer only make the bubble larger.
        """
        mesh = ground.mesh
        if ground.num_samples > max(self._sizes):
            return False
        if mesh.pipeline == 1 or self.constraints.microbatch_size or self.constraints.microbatches:
            return True
        share = self.subject.batch // mesh.data
        sizes = [size for size in self._sizes if share % size == 0]
        per_sample = {size: sum(self.bench.base_rows(size).works[:2]) / size for size in sizes}
        least = min(per_sample.values())
        enough = min(size for size in sizes if per_sample[size] <= _FILLED * least)
        return ground.num_samples <= enough * max(1, mesh.inner // 4)

    @cached_property
    def _sizes(self) -> list[int]:
        """Samples of a microbatch, from the smallest up to where no item fits any more."""
        grounds = list(self.space.grounds())
        inner = max((ground.mesh.inner for ground in grounds), default=1)
        found: list[int] = []
        for size in sorted({ground.num_samples for ground in grounds}):
            if found and self._fullest(size) > inner * self._most_bytes:
                break
            found.append(size)
        return found

    def _fullest(self, num_samples: int) -> float:
        """What the fullest operator of a microbatch has around it, run again or not."""
        rows = self.bench.base_rows(num_samples)
        return float((rows.saved + rows.temporary).max())

    def out_of_time(self) -> bool:
        """Whether the search has to stop, which is then on record."""
        # Something is looked at however little time there is.
        if self.trials.considered and self.clock() > self.deadline:
            self.stopped = True
        return self.stopped

    def _tell(self, ground: Ground) -> None:
        best = self.frontier.best
        self.progress(
            f"{ground.mesh}, microbatches of {ground.num_samples}", best.step_s if best else None
        )

    def bound(self, ground: Ground) -> tuple[float, float]:
        """No plan on this ground is faster, or holds less: its work without any communication,
        spread evenly, with the pipeline's filling; its parameters, spread as far as may be, and
        what passes through the fullest operator.
        """
        rows = self.bench.base_rows(ground.num_samples)
        mesh = ground.mesh
        return self._spread_s(ground, rows, mesh.inner), self._least_bytes(ground)[0]

    def _least_bytes(self, ground: Ground) -> tuple[float, float]:
        """What a device holds at least, with what is tried first and then: its share of the
        parameters, and what passes through.
        """
        mesh = ground.mesh
        held = float(self.bench.base_rows(ground.num_samples).held.sum())
        share = held / (mesh.pipeline * mesh.tensor)
        passing = self._fullest(ground.num_samples) / mesh.inner
        kept = self.trials.hosted.keeps(self.trials.ways(mesh), natively=mesh.pipeline == 1)
        first, then = (share * host.least(several, mesh.data) + passing for several in kept)
        return first, then

    def _with_host(self) -> None:
        """Look at a few grounds that fit with the host alone; at all, where nothing else fits."""
        found = []
        for ground in self.space.grounds():
            least, moved = self._least_bytes(ground)
            if least > self._most_bytes >= moved and self._worth(ground):
                found.append((self.bound(ground)[0], ground))
        for number, (bound_s, ground) in enumerate(sorted(found)):
            best = self.frontier.best
            if self.out_of_time() or (best and (number >= _HOSTED or bound_s > best.step_s)):
                return
            self._tell(ground)
            self.look_at(ground)

    def _laid_out_s(self, ground: Ground, layouts: Layouts) -> float:
        """The same of operators laid out, with what moving their tensors takes."""
        stack = self.bench.stack(ground)
        devices = {group.node.device.name: group.node.device for group in self.cluster.groups}
        fastest = max(devices.values(), key=lambda one: one.peak(self.subject.dtype))
        device = stack.device if len(devices) == 1 else fastest
        return self._spread_s(ground, self.bench.as_rows(stack.costs(layouts, device)), 1)

    def _spread_s(self, ground: Ground, rows: Rows, parts: int) -> float:
        mesh = ground.mesh
        families = self.trials.families(mesh, ground.microbatches)
        if not families:
            return math.inf
        works = rows.works
        return min(
            schedules.bound_s(family, mesh.pipeline, ground.microbatches, *works)
            for family in families
        ) / parts  # fmt: skip

    # One ground -----------------------------------------------------------------------------

    def elsewhere(self, cluster: Cluster, limit_bytes: float, *, alike: bool = False) -> Outer:
        """Return a search like this one on another cluster, with nothing found yet. `alike`: all
        takes as long there, so layouts and their costs are kept.
        """
        bench = Bench(
            self.subject, cluster, self.num_ranks, self.constraints, self.calibration,
            outline=self.outline, like=self.bench if alike else None,
        )  # fmt: skip
        return Outer(
            self.subject, cluster, self.num_ranks, limit_bytes, self.constraints,
            self.calibration, self.deadline, lambda _doing, _best_s: None, shared=bench,
        )  # fmt: skip

    def look_at(self, ground: Ground, far: float = 1.0) -> None:
        """Estimate the candidates of a ground that may take at most `far` times the best."""
        known = list(self._usual(ground))
        fastest = self._fastest(ground) if self._searches_splits else None
        if fastest is not None:
            known.append(Split(SEARCHED, fastest, self.bench.stack(ground)))
        if not self.trials.look_at(ground, known, far):
            self.trials.look_at(ground, self._lean(ground), far)

    @property
    def _searches_splits(self) -> bool:
        wanted = self.constraints.splits
        return not self.constraints.native and (wanted is None or "searched" in wanted)

    def _usual(self, ground: Ground) -> Iterator[Split]:
        """Yield what takes no search to lay out: operators whole, Linears by columns and rows."""
        stack = self.bench.stack(ground)
        if not stack.axes:
            yield Split(WHOLE, stack.fastest(Weights()), stack)
            return
        for split, layouts in self.bench.linears(stack).items():
            yield Split(split, layouts, stack)

    def _fastest(self, ground: Ground) -> Layouts | None:
        """Return the fastest layouts, or None where the axes gain nothing."""
        stack = self.bench.stack(ground)
        if not stack.axes:
            return None
        weights = Weights.near(ground.microbatches)
        found = stack.fastest(weights, time_limit_s=_BLOCK_LIMIT_S)
        return found if found.splits_anything else None

    def _lean(self, ground: Ground) -> Iterator[Split]:
        """Yield layouts that hold less, where the others did not fit, and may still be best."""
        stack = self.bench.stack(ground)
        if not stack.axes or not self._searches_splits:
            return
        weights = Weights.near(ground.microbatches)
        for room in (0.0, 0.5):
            found = stack.tightened(weights, room, time_limit_s=_BLOCK_LIMIT_S)
            if not found.splits_anything:
                return
            yield Split(LEAN, found, stack)
            best = self.frontier.best
            if best is not None and self._laid_out_s(ground, found) > _CLOSE * best.step_s:
                return
