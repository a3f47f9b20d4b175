"""Trials of one ground: for layouts of its operators, every schedule, way of parameters and
recomputation that constraints allow is cut into stages and estimated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from toolkit.plan.plan import DATA_WAYS, PIPELINED_WAYS, How
from toolkit.plan.search import host, schedules
from toolkit.plan.search.arrange import Arranger, Recompute
from toolkit.plan.search.bench import MEGATRON, TOKENS, WHOLE, Bench, by_program
from toolkit.plan.search.frontier import Candidate, Frontier, Unfit
from toolkit.plan.search.host import Hosted, Keep
from toolkit.plan.search.site import Mesh, Site
from toolkit.plan.search.space import Ground, Space
from toolkit.plan.search.stack import Layouts, Stack


class Split(NamedTuple):
    """How operators are split, the layouts that say so, and of what."""

    name: str
    layouts: Layouts
    stack: Stack


class _Trial(NamedTuple):
    """What a ground is tried with."""

    ground: Ground
    split: Split
    arranger: Arranger
    mode: Recompute


@dataclass
class Trials:
    """Tries candidates, and keeps those that nothing beats within `limit_bytes`."""

    bench: Bench
    space: Space
    limit_bytes: float
    frontier: Frontier = field(default_factory=Frontier)
    considered: int = 0
    squeezed: bool = False  # memory made something slower, or ruled it out
    nearest: Unfit | None = None

    def __post_init__(self) -> None:
        self.constraints = self.bench.constraints
        self.outline = self.bench.outline
        self.hosted = Hosted.of(self.constraints, self.bench.cluster, self.bench.num_ranks)

    def families(self, mesh: Mesh, microbatches: int) -> list[str]:
        """Return the schedules that constraints and counts allow."""
        if mesh.pipeline == 1:
            return ["1f1b"]
        wanted: Sequence[str] = self.constraints.schedules or schedules.SEARCHED
        if self.outline.num_passes > 1:
            wanted = [schedules.RECYCLED] if self._recycles else []
        return [
            family
            for family in wanted
            if schedules.num_chunks(family) * mesh.pipeline <= len(self.outline.blocks)
            and not schedules.possible(family, mesh.pipeline, microbatches)
        ]

    @cached_property
    def _recycles(self) -> bool:
        """Whether a pipeline of several passes is allowed, and known to the search."""
        wanted, plans = self.constraints.schedules, self.constraints.plans
        named = schedules.RECYCLED in (plans or ())
        return self.outline.num_passes == schedules.PASSES and (
            named or (wanted is None and plans is None)
        )

    def ways(self, mesh: Mesh) -> list[How]:
        """Return the ways of parameters over the data axis, the most sharded last."""
        if mesh.data == 1:
            return ["replicate"]
        wanted = self.constraints.parameters
        # What is whole everywhere is the same in groups.
        possible = DATA_WAYS[1:] if mesh.replica > 1 else DATA_WAYS
        return [way for way in possible if wanted is None or way in wanted]

    def look_at(self, ground: Ground, splits: Iterable[Split], far: float = 1.0) -> bool:
        """Try a ground with operators split in these ways, where that may take at most `far` times
        the best; return whether all fit.
        """
        bench = self.bench
        grouped = self._grouped(ground.mesh)
        ways = {
            by_program: [
                Site(bench.subject, bench.cluster, mesh, bench.calibration, by_program)
                for mesh in grouped
            ]
            for by_program in (False, True)
        }
        fit = True
        for split in splits:
            sites = ways[self._by_program(split.name, ground.mesh)]
            for site in sites:
                here = ground._replace(mesh=site.mesh)
                estimator = bench.estimator(site, split.stack, split.layouts, here)
                arranger = Arranger(estimator, self.outline.starts, self.constraints.equal_stages)
                fits = [
                    self._every(_Trial(here, split, arranger, mode), far) for mode in self._modes
                ]
                # Groups hold more than all ranks together do, which is tried first.
                fit &= all(fits) or site is not sites[0]
        return fit

    def _grouped(self, mesh: Mesh) -> list[Mesh]:
        """Return a mesh with its data axis in one group, and in those that are allowed."""
        if mesh.replica > 1:
            return [mesh]
        return [
            mesh._replace(replica=groups, data=mesh.data // groups)
            for groups in self.space.replicas(mesh)
        ]

    def free_s(self, ground: Ground, split: Split) -> float:
        """Return the seconds of a 1F1B step if memory were no limit: nothing is run again, and
        parameters are whole.
        """
        bench = self.bench
        by_program = self._by_program(split.name, ground.mesh)
        site = Site(bench.subject, bench.cluster, ground.mesh, bench.calibration, by_program)
        estimator = bench.estimator(site, split.stack, split.layouts, ground)
        arranger = Arranger(estimator, self.outline.starts)
        trial = _Trial(ground, split, arranger, "none")
        found = self._estimated(trial, "1f1b", Keep("replicate", "none"), "none", float("inf"))
        return float("inf") if found is None else found.step_s

    @cached_property
    def _modes(self) -> list[Recompute]:
        allowed = self.constraints.recompute or ["needed", "all"]
        modes: list[Recompute] = []
        for mode in allowed:
            if mode == "none" and "needed" not in allowed:
                modes.append("none")
            elif mode == "needed":
                modes.append("needed")
            elif mode == "all":
                modes.append("all")
        return modes

    def _every(self, trial: _Trial, far: float) -> bool:
        """Try every schedule and way of parameters; return whether all fit."""
        ground = trial.ground
        fit = True
        works = trial.arranger.estimator.rows[0].works
        for family in self.families(ground.mesh, ground.microbatches):
            if not self._runs(trial.split.name, ground.mesh, schedules.splits_backward(family)):
                continue
            best = self.frontier.best
            bound_s = schedules.bound_s(family, ground.mesh.pipeline, ground.microbatches, *works)
            if best is not None and bound_s > far * best.step_s:
                continue
            ways = self.ways(ground.mesh)
            if self.constraints.runnable:
                ways = [way for way in ways if way in self._run(trial.split.name, ground.mesh)]
            # With all recomputed it is memory that counts: where it is sharded the most.
            ways = ways[-2:] if trial.mode == "all" else ways
            natively = ground.mesh.pipeline == 1 and trial.split.name in (WHOLE, MEGATRON)
            first, then = self.hosted.keeps(ways, natively=natively)
            fits = [self._candidate(trial, family, keep) for keep in first]
            if not any(fits):
                best_s = float("inf") if best is None else far * best.step_s
                for keep in host.worth(then, trial.arranger.estimator, bound_s, best_s):
                    self._candidate(trial, family, keep)
            fit &= all(fits)
        return fit

    def _by_program(self, split: str, mesh: Mesh) -> bool:
        """Whether the own executor runs this."""
        return by_program(split, mesh) or self.outline.num_passes > 1

    def _run(self, split: str, mesh: Mesh) -> tuple[How, ...]:
        """The ways of parameters that the rung of this takes."""
        if self._by_program(split, mesh):
            return ("replicate",)
        return PIPELINED_WAYS if mesh.pipeline > 1 else DATA_WAYS

    def _runs(self, split: str, mesh: Mesh, halves: bool) -> bool:
        """Whether some rung runs this: the own executor has whole backwards alone, and tokens
        are split by the native one.
        """
        if not self.constraints.runnable:
            return True
        return not self._by_program(split, mesh) or not (halves or split == TOKENS)

    def _candidate(self, trial: _Trial, family: str, keep: Keep) -> bool:
        """Arrange and estimate one candidate; return whether it fits."""
        self.considered += 1
        limit = self.limit_bytes
        for _ in range(3):
            candidate = self._estimated(trial, family, keep, trial.mode, limit)
            if candidate is None:
                break
            self.squeezed |= trial.mode == "needed" and candidate.recomputed > 0
            if self._fits(candidate, trial.arranger.estimator.site):
                self.frontier.add(candidate)
                return True
            # The bounds inside were not tight enough: aim lower by as much as it was over.
            limit *= min(0.98, self.limit_bytes / candidate.peak_bytes)
        self.squeezed = True
        if self.frontier.best is None:
            self._note_unfit(trial, family, keep)
        return False

    def _estimated(
        self, trial: _Trial, family: str, keep: Keep, mode: Recompute, limit: float
    ) -> Candidate | None:
        """Return the best stages for a limit, estimated; None where nothing stays within it."""
        ground, split, arranger = trial.ground, trial.split, trial.arranger
        found = arranger.arrange(
            family=family, microbatches=ground.microbatches, parameters=keep.way, recompute=mode,
            limit=limit, offload=keep.offload,
        )  # fmt: skip
        if found is None:
            return None
        estimate = arranger.estimator.estimate(
            found.stretches, found.positions,
            family=family, microbatches=ground.microbatches, zero=keep.way, offload=keep.offload,
        )  # fmt: skip
        return Candidate(
            ground.mesh, ground.num_samples, ground.microbatches, family, keep.way, split.name,
            sum(self.outline.num_blocks(s.begin, s.again) for s in found.stretches),
            found.stretches, found.positions, estimate, split.stack, split.layouts, keep.offload,
        )  # fmt: skip

    def _fits(self, candidate: Candidate, site: Site) -> bool:
        return candidate.estimate.fits_host and all(
            sum(sizes.values()) <= min(self.limit_bytes, site.classes[position].memory_bytes)
            for position, sizes in enumerate(candidate.estimate.memory)
        )

    def _note_unfit(self, trial: _Trial, family: str, keep: Keep) -> None:
        """Remember by how much the nearest candidate misses the limit."""
        candidate = self._estimated(trial, family, keep, "all", float("inf"))
        if candidate is None:
            return
        unfit = Unfit(candidate, self.limit_bytes)
        if self.nearest is None or unfit.over_bytes < self.nearest.over_bytes:
            self.nearest = unfit
