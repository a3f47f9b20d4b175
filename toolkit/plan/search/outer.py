"""The outer search: meshes, microbatches, schedules, ways of parameters, recomputation.

    for each mesh and microbatch, most promising first:
        lay out the blocks -> price the items -> for each schedule and way of parameters:
        cut into stages -> estimate -> keep what nothing beats

A ground whose bound is beaten is not looked at. The search can stop at any time with what it has.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from toolkit.cost.calibration import Calibration
from toolkit.errors import InfeasibleError
from toolkit.hardware import Cluster
from toolkit.plan.plan import DATA_WAYS, How
from toolkit.plan.search import host, schedules
from toolkit.plan.search.arrange import Arranger, Recompute
from toolkit.plan.search.bench import LEAN, MEGATRON, SEARCHED, TOKENS, WHOLE, Bench, by_program
from toolkit.plan.search.choice import Weights
from toolkit.plan.search.constraints import Constraints
from toolkit.plan.search.frontier import Candidate, Frontier, Unfit
from toolkit.plan.search.host import Hosted, Keep
from toolkit.plan.search.rows import Rows
from toolkit.plan.search.site import Mesh, Site
from toolkit.plan.search.space import MOST_SAMPLES, Ground, Space, divisors
from toolkit.plan.search.stack import Layouts, Stack
from toolkit.plan.subject import Subject

# Of grounds that cannot be faster than the best, so many are looked at as may hold less, and none
# whose bound is this much above the best.
_FAR = 1.5
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
    frontier: Frontier = field(default_factory=Frontier)
    considered: int = 0
    pruned: int = 0
    stopped: bool = False
    squeezed: bool = False  # memory made something slower, or ruled it out
    nearest: Unfit | None = None
    shared: Bench | None = None

    def __post_init__(self) -> None:
        self.bench = self.shared or Bench(
            self.subject, self.cluster, self.num_ranks, self.constraints, self.calibration
        )
        self.outline = self.bench.outline
        self.hosted = Hosted.of(self.constraints, self.cluster, self.num_ranks)
        self.space = Space(
            self.cluster, self.num_ranks, self.subject.batch, len(self.subject.blocks),
            self.constraints,
        )  # fmt: skip
        devices = (self.cluster.device(rank) for rank in range(self.num_ranks))
        self._most_bytes = min(self.limit_bytes, max(one.memory_bytes for one in devices))
        blocks = [i for i, item in enumerate(self.outline.items) if item.path is not None]
        self.starts = (0, *blocks[1:])

    # The loop -------------------------------------------------------------------------------

    def run(self) -> None:
        """Search until everything is looked at or left out, or time is up.

        The ground with the lowest bound is next; the first time, its operators are laid out, and
        it waits again with the bound that their communication gives.
        """
        waiting = [
            (*self.bound(ground), ground.mesh.inner, ground, False)
            for ground in self.space.grounds()
            if self._worth(ground)
        ]
        if not waiting:
            raise InfeasibleError(
                f"no plan of {self.subject.model} for {self.num_ranks} devices of "
                f"{self.cluster.name}: {self.space.why_empty()}",
                remedy="change the batch, the number of ranks, or the constraints",
            )
        heapq.heapify(waiting)
        slower: list[Ground] = []
        least = min(waiting, key=lambda one: one[1])
        while waiting and not self._out_of_time():
            bound_s, least_bytes, inner, ground, laid_out = heapq.heappop(waiting)
            best = self.frontier.best
            if least_bytes > self._most_bytes:
                self.pruned += 1
                continue
            if best is not None and bound_s > best.step_s:
                self.pruned += 1
                if laid_out and bound_s < _FAR * best.step_s:
                    slower.append(ground)
                continue
            self._tell(ground)
            if laid_out or best is None:
                # Without anything yet, what is promising is looked at at once.
                self.look_at(ground)
            else:
                layouts = min(
                    (self._laid_out_s(ground, found) for _, found, _ in self._usual(ground)),
                    default=bound_s,
                )
                heapq.heappush(waiting, (max(bound_s, layouts), least_bytes, inner, ground, True))
        if not self.considered:
            self.look_at(least[3])
        # What cannot be faster may hold less: the frontier's other end.
        for ground in slower[:_SLOWER]:
            if self._out_of_time():
                return
            self._tell(ground)
            self.look_at(ground, _FAR)
        self._with_host()

    def _worth(self, ground: Ground) -> bool:
        """Whether a pipeline could gain by microbatches this large: of more than fill a device,
        fewer only make the bubble larger.
        """
        mesh = ground.mesh
        if mesh.pipeline == 1 or self.constraints.microbatch_size or self.constraints.microbatches:
            return True
        share = self.subject.batch // mesh.data
        sizes = [size for size in divisors(share) if size <= MOST_SAMPLES]
        per_sample = {size: sum(self.bench.base_rows(size).works[:2]) / size for size in sizes}
        least = min(per_sample.values())
        enough = min(size for size in sizes if per_sample[size] <= _FILLED * least)
        return ground.num_samples <= enough * max(1, mesh.inner // 4)

    def _out_of_time(self) -> bool:
        # Something is looked at however little time there is.
        if self.considered and time.monotonic() > self.deadline:
            self.stopped = True
        return self.stopped

    def _tell(self, ground: Ground) -> None:
        best = self.frontier.best
        self.progress(
            f"{ground.mesh}, microbatches of {ground.num_samples}", best.step_s if best else None
        )

    def bound(self, ground: Ground) -> tuple[float, float]:
        """No plan on this ground is faster, or holds less: its work without any communication,
        spread evenly, with the pipeline's filling; its parameters, spread as far as may be.
        """
        rows = self.bench.base_rows(ground.num_samples)
        mesh = ground.mesh
        bound_s = self._spread_s(ground, rows, mesh.inner)
        return bound_s, self._least_bytes(ground)[0]

    def _least_bytes(self, ground: Ground) -> tuple[float, float]:
        """The parameters' share of a device, with what is tried first and then."""
        mesh = ground.mesh
        held = float(self.bench.base_rows(ground.num_samples).held.sum())
        share = held / (mesh.pipeline * mesh.tensor)
        first, then = self.hosted.keeps(self._ways(mesh), natively=mesh.pipeline == 1)
        return share * host.least(first, mesh.data), share * host.least(then, mesh.data)

    def _with_host(self) -> None:
        """Look at a few grounds that fit with the host alone; at all, where nothing else fits."""
        found = []
        for ground in self.space.grounds():
            least, moved = self._least_bytes(ground)
            if least > self._most_bytes >= moved and self._worth(ground):
                found.append((self.bound(ground)[0], ground))
        for number, (bound_s, ground) in enumerate(sorted(found)):
            best = self.frontier.best
            if self._out_of_time() or (best and (number >= _HOSTED or bound_s > best.step_s)):
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
        families = self._families(mesh, ground.microbatches)
        if not families:
            return math.inf
        works = rows.works
        return min(
            schedules.bound_s(family, mesh.pipeline, ground.microbatches, *works)
            for family in families
        ) / parts  # fmt: skip

    def _families(self, mesh: Mesh, microbatches: int) -> list[str]:
        wanted = self.constraints.schedules or schedules.SEARCHED
        if mesh.pipeline == 1:
            return ["1f1b"]
        return [
            family
            for family in wanted
            if schedules.num_chunks(family) * mesh.pipeline <= len(self.subject.blocks)
            and not schedules.possible(family, mesh.pipeline, microbatches)
        ]

    def _ways(self, mesh: Mesh) -> list[How]:
        if mesh.data == 1:
            return ["replicate"]
        wanted = self.constraints.parameters
        return [way for way in DATA_WAYS if wanted is None or way in wanted]

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
        site = Site(self.subject, self.cluster, ground.mesh, self.calibration)
        allowed = self.constraints.recompute or ["needed", "all"]
        modes: list[Recompute] = []
        for mode in allowed:
            if mode == "none" and "needed" not in allowed:
                modes.append("none")
            elif mode == "needed":
                modes.append("needed")
            elif mode == "all":
                modes.append("all")
        usual = list(self._usual(ground))
        fit = [self._layout(site, ground, mode, far, *one) for mode in modes for one in usual]
        if not all(fit):
            for one in self._lean(ground):
                for mode in modes:
                    self._layout(site, ground, mode, far, *one)

    @property
    def _searches_splits(self) -> bool:
        wanted = self.constraints.splits
        return not self.constraints.native and (wanted is None or "searched" in wanted)

    def _usual(self, ground: Ground) -> Iterator[tuple[str, Layouts, Stack]]:
        """Yield the layouts to try first: Linears by columns and rows, and the fastest."""
        stack = self.bench.stack(ground)
        if not stack.axes:
            yield WHOLE, stack.fastest(Weights()), stack
            return
        for split, layouts in self.bench.linears(stack).items():
            yield split, layouts, stack
        if self._searches_splits:
            weights = Weights.near(ground.microbatches)
            fastest = stack.fastest(weights, time_limit_s=_BLOCK_LIMIT_S)
            if fastest.splits_anything:
                yield SEARCHED, fastest, stack

    def _lean(self, ground: Ground) -> Iterator[tuple[str, Layouts, Stack]]:
        """Yield layouts that hold less, where the others did not fit, and may still be best."""
        stack = self.bench.stack(ground)
        if not stack.axes or not self._searches_splits:
            return
        weights = Weights.near(ground.microbatches)
        for room in (0.0, 0.5):
            found = stack.tightened(weights, room, time_limit_s=_BLOCK_LIMIT_S)
            if not found.splits_anything:
                return
            yield LEAN, found, stack
            best = self.frontier.best
            if best is not None and self._laid_out_s(ground, found) > _CLOSE * best.step_s:
                return

    def _layout(
        self,
        site: Site,
        ground: Ground,
        mode: Recompute,
        far: float,
        split: str,
        layouts: Layouts,
        stack: Stack,
    ) -> bool:
        """Try every schedule and way of parameters; return whether all fit."""
        arranger = Arranger(self.bench.estimator(site, stack, layouts, ground), self.starts)
        fit = True
        works = arranger.estimator.rows[0].works
        for family in self._families(ground.mesh, ground.microbatches):
            if not self._runs(split, ground.mesh, schedules.splits_backward(family)):
                continue
            best = self.frontier.best
            bound_s = schedules.bound_s(family, ground.mesh.pipeline, ground.microbatches, *works)
            if best is not None and bound_s > far * best.step_s:
                continue
            ways = self._ways(ground.mesh)
            if self.constraints.runnable and by_program(split, ground.mesh):
                ways = [way for way in ways if way == "replicate"]
            # With all recomputed it is memory that counts: where it is sharded the most.
            ways = ways[-2:] if mode == "all" else ways
            natively = ground.mesh.pipeline == 1 and split in (WHOLE, MEGATRON)
            first, then = self.hosted.keeps(ways, natively=natively)
            rest = (family, mode, split, layouts, stack)
            fits = [self._candidate(ground, arranger, keep, *rest) for keep in first]
            if not any(fits):
                best_s = math.inf if best is None else far * best.step_s
                for keep in host.worth(then, arranger.estimator, bound_s, best_s):
                    self._candidate(ground, arranger, keep, *rest)
            fit &= all(fits)
        return fit

    def _runs(self, split: str, mesh: Mesh, halves: bool) -> bool:
        """Whether some rung runs this: the own executor has whole backwards alone, and tokens
        are split by the native one.
        """
        if not self.constraints.runnable:
            return True
        return not by_program(split, mesh) or not (halves or split == TOKENS)

    def _candidate(
        self,
        ground: Ground,
        arranger: Arranger,
        keep: Keep,
        family: str,
        mode: Recompute,
        split: str,
        layouts: Layouts,
        stack: Stack,
    ) -> bool:
        """Arrange and estimate one candidate; return whether it fits."""

        def made(mode: Recompute, limit: float) -> Candidate | None:
            found = arranger.arrange(
                family=family, microbatches=ground.microbatches, parameters=keep.way,
                recompute=mode, limit=limit, offload=keep.offload,
            )  # fmt: skip
            if found is None:
                return None
            estimate = arranger.estimator.estimate(
                found.stretches, found.positions, family=family,
                microbatches=ground.microbatches, zero=keep.way, offload=keep.offload,
            )  # fmt: skip
            return Candidate(
                ground.mesh, ground.num_samples, ground.microbatches, family, keep.way, split,
                sum(self.outline.num_blocks(s.begin, s.again) for s in found.stretches),
                found.stretches, found.positions, estimate, stack, layouts, keep.offload,
            )  # fmt: skip

        self.considered += 1
        limit = self.limit_bytes
        for _ in range(3):
            candidate = made(mode, limit)
            if candidate is None:
                break
            self.squeezed |= mode == "needed" and candidate.recomputed > 0
            if self._fits(candidate, arranger.estimator.site):
                self.frontier.add(candidate)
                return True
            # The bounds inside were not tight enough: aim lower by as much as it was over.
            limit *= min(0.98, self.limit_bytes / candidate.peak_bytes)
        self.squeezed = True
        # Remember by how much the nearest candidate misses the limit.
        smallest = made("all", math.inf) if self.frontier.best is None else None
        if smallest is not None:
            unfit = Unfit(smallest, self.limit_bytes)
            if self.nearest is None or unfit.over_bytes < self.nearest.over_bytes:
                self.nearest = unfit
        return False

    def _fits(self, candidate: Candidate, site: Site) -> bool:
        return candidate.estimate.fits_host and all(
            sum(sizes.values()) <= min(self.limit_bytes, site.classes[position].memory_bytes)
            for position, sizes in enumerate(candidate.estimate.memory)
        )
