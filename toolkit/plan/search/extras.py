"""Plans of the library that the candidates do not cover, written whole and predicted:

    co-shard     grids whose blocks run part by part on their device: the fewest that make it fit
    interlaced   a vocabulary split over all stages, where it is large against a stage
    3f1b, dap    models that run their blocks several times

A plan whose bound is beaten is not written, and no more is predicted than `_BUDGET` allows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from toolkit.cost.calibration import Calibration
from toolkit.errors import InfeasibleError, UsageError
from toolkit.hardware import Cluster
from toolkit.plan import chain, predict, recycling
from toolkit.plan.library import dap, grid, interlaced, three_f_one_b
from toolkit.plan.plan import OFFLOADS, Alternative, Plan
from toolkit.plan.program import pattern, regions
from toolkit.plan.search.constraints import Constraints
from toolkit.plan.search.frontier import cut
from toolkit.plan.search.outer import FAR, Outer, Progress
from toolkit.plan.search.space import Ground, Space
from toolkit.plan.search.trial import Split
from toolkit.plan.subject import Subject
from toolkit.units import format_bytes, format_seconds

# Parts of a co-shard, the cheapest first.
_PARTS = (2, 4, 8)
# Operators x ranks x parts that are predicted one by one, of a plan and of all together.
_MOST, _BUDGET = 32_768, 262_144
_MOST_OPS = 4096
# Grounds that a kind of plan is written for, the most promising first.
_GROUNDS = 4
# Microbatches that a list schedule orders in seconds.
_MOST_ORDERED = 64
# A vocabulary is large against a stage from this share of its layers' parameters on.
_LARGE = 0.5


@dataclass(frozen=True)
class Written:
    """A plan of the library, predicted."""

    plan: Plan
    description: str

    @property
    def step_s(self) -> float:
        assert self.plan.prediction is not None
        return self.plan.prediction.step_s

    @property
    def peak_bytes(self) -> int:
        assert self.plan.prediction is not None
        return self.plan.prediction.peak_bytes

    def alternative(self, reason: str = "") -> Alternative:
        """Return what a plan remembers of it."""
        return Alternative(self.description, self.step_s, self.peak_bytes, reason)

    def __str__(self) -> str:
        return f"{format_seconds(self.step_s)}, {format_bytes(self.peak_bytes)}: {self.description}"


class _Wish(NamedTuple):
    """A plan to write: what it is called, how, and operators x ranks x parts of it."""

    name: str
    write: Callable[[], Plan]
    size: float


@dataclass
class Extras:
    """Writes what is allowed beside a search (`outer`; None for a model it cannot lay out)."""

    subject: Subject
    cluster: Cluster
    num_ranks: int
    limit_bytes: float
    constraints: Constraints
    calibration: Calibration | None
    deadline: float
    progress: Progress
    outer: Outer | None
    found: list[Written] = field(default_factory=list)
    unfit: list[Written] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    stopped: bool = False
    considered: int = 0
    _left: float = _BUDGET

    def run(self) -> list[Written]:
        """Return the plans that fit, the fastest first."""
        if self.constraints.native or self.constraints.replicated:
            return []
        if "none" not in (self.constraints.offload or OFFLOADS):
            return []  # these keep everything on the device
        if not self.constraints.allows("replica", 1):
            return []  # and parameters whole
        if self.outer is None or self.outer.outline.num_passes > 1:
            # What the search has laid out itself is predicted in full where that is quick.
            if self.outer is None or len(self.subject.graph.ops) <= _MOST_OPS:
                self._several_passes()
        else:
            if self._allows("interlaced"):
                self._interlaced()
            if self._allows("co-shard"):
                self._co_shard(self.outer)
        self.found.sort(key=lambda one: one.step_s)
        return self.found

    # Kinds of plans -------------------------------------------------------------------------

    def _several_passes(self) -> None:
        """Blocks that run several times: data parallel with axial splits, and pipelines."""
        num_blocks = len(recycling.blocks_by_pass(self.subject.graph)[0])
        grounds = list(self._grounds(num_blocks))
        splits = [g for g in grounds if g.mesh.pipeline == g.mesh.tensor == 1]
        pipelines = [
            ground
            for ground in grounds
            if ground.mesh.inner == 1 < ground.mesh.pipeline <= ground.microbatches <= _MOST_ORDERED
        ]
        wishes = [self._dap(one) for one in _few(splits, lambda g: g.mesh) if self._allows("dap")]
        if self._allows("3f1b") and self._orders("3f1b"):
            # After plain data parallelism, before what asks more of predictions.
            wishes[1:1] = [self._three_f_one_b(one) for one in _few(pipelines, lambda g: g.mesh)]
        for wish in wishes:
            self._with_recompute(wish)

    def _dap(self, ground: Ground) -> Callable[[bool], _Wish]:
        mesh = ground.mesh

        def wish(again: bool) -> _Wish:
            return _Wish(
                _name("dap" if mesh.context > 1 else "blocks by pass", ground, again),
                lambda: dap.plan(
                    self.subject, self.cluster, num_ranks=self.num_ranks, recompute=again,
                    microbatches=ground.microbatches, context=mesh.context,
                ),
                self._size(mesh.context),
            )  # fmt: skip

        return wish

    def _three_f_one_b(self, ground: Ground) -> Callable[[bool], _Wish]:
        def wish(again: bool) -> _Wish:
            return _Wish(
                _name("3f1b", ground, again),
                lambda: three_f_one_b.plan(
                    self.subject, self.cluster, num_ranks=self.num_ranks, recompute=again,
                    microbatches=ground.microbatches, data=ground.mesh.data,
                ),
                self._size(ground.mesh.pipeline),
            )  # fmt: skip

        return wish

    def _interlaced(self) -> None:
        graph = self.subject.graph
        looked_up = {op.inputs[0] for op in graph.ops if op.kind == "aten.embedding"}
        learned = {tensor.name: tensor.num_bytes for tensor in graph.parameters()}
        table = max((size for name, size in learned.items() if name in looked_up), default=0)
        layers = sum(learned.values()) - table
        grounds = [
            ground
            for ground in self._grounds(len(self.subject.blocks))
            if ground.mesh.inner == 1 < ground.mesh.pipeline <= ground.microbatches <= _MOST_ORDERED
            and table >= _LARGE * layers / ground.mesh.pipeline
        ]
        if not self._orders("interlaced"):
            return
        for ground in _few(grounds, lambda g: g.mesh):

            def wish(again: bool, ground: Ground = ground) -> _Wish:
                return _Wish(
                    _name("interlaced", ground, again),
                    lambda: interlaced.plan(
                        self.subject, self.cluster, num_ranks=self.num_ranks, recompute=again,
                        microbatches=ground.microbatches, data=ground.mesh.data,
                    ),
                    self._size(ground.mesh.pipeline),
                )  # fmt: skip

            self._with_recompute(wish)

    def _co_shard(self, outer: Outer) -> None:
        """Where memory binds, the fewest blocks that make a ground fit; else, all of them once,
        for what they save.
        """
        grounds = [
            ground
            for ground in self._grounds(len(self.subject.blocks))
            if ground.mesh.context == 1
            and (ground.mesh.pipeline == 1 or self._orders("1f1b"))
            and self._holds(outer, ground)
        ]
        grounds.sort(key=lambda one: outer.bound(one)[0])
        if not outer.trials.squeezed:
            for ground in [one for one in grounds if one.mesh.inner == 1][:1]:
                for parts in _PARTS:
                    self._try(self._sharded(ground, parts, self.subject.blocks, again=True))
            return
        for ground in _few(grounds, lambda g: g.mesh)[:_GROUNDS]:
            if self._may_win(outer, ground):
                self._fewest(outer, ground)

    def _may_win(self, outer: Outer, ground: Ground) -> bool:
        """Whether the ground is faster than the best if memory were no limit: parts of a co-shard
        take no less, and are run again.
        """
        stack = outer.bench.stack(ground)
        layouts = outer.bench.heads(stack)
        best = outer.frontier.best
        if layouts is None or best is None:
            return layouts is not None
        return outer.trials.free_s(ground, Split("", layouts, stack)) < best.step_s

    def _holds(self, outer: Outer, ground: Ground) -> bool:
        """Whether parameters and states alone fit: they are whole on every replica."""
        held = float(outer.bench.base_rows(ground.num_samples).held.sum())
        return 4 * held / (ground.mesh.pipeline * ground.mesh.tensor) <= self.limit_bytes

    def _fewest(self, outer: Outer, ground: Ground) -> None:
        """Try, for each number of parts, how few blocks have to be co-sharded."""
        rows = outer.bench.base_rows(ground.num_samples)
        saved = {
            item.path: rows.saved[place]
            for place, item in enumerate(outer.outline.items)
            if item.path is not None
        }
        # What saves the most, and under a pipeline's first stages, goes first.
        order = sorted(self.subject.blocks, key=lambda path: -saved[path])
        fewest = len(order) + 1
        for parts in _PARTS:
            low, high = 0, min(fewest, len(order))
            if not self._fits(ground, parts, order[:high], again=False):
                if high == len(order):
                    self._try(self._sharded(ground, parts, tuple(order), again=True))
                continue
            while high - low > max(1, len(order) // 16):
                middle = (low + high) // 2
                if self._fits(ground, parts, order[:middle], again=False):
                    high = middle
                else:
                    low = middle
            fewest = high

    def _fits(self, ground: Ground, parts: int, blocks: Sequence[str], *, again: bool) -> bool:
        found = self._try(self._sharded(ground, parts, tuple(blocks), again=again))
        return found is not None and found in self.found

    def _sharded(
        self, ground: Ground, parts: int, blocks: tuple[str, ...], *, again: bool
    ) -> _Wish:
        """Co-shard `blocks` of a grid in so many parts."""
        mesh = ground.mesh

        def write() -> Plan:
            plan = grid.plan(
                self.subject, self.cluster, num_ranks=self.num_ranks,
                microbatches=ground.microbatches, pipeline=mesh.pipeline, tensor=mesh.tensor,
            )  # fmt: skip
            micro = self.subject.graph.at(batch=ground.num_samples)
            dims = regions.dims(micro, parts * mesh.tensor, "a tensor degree and co-shards of")
            inside = {
                op.name
                for segment in chain.segments(micro)
                if segment.path in blocks
                for op in segment.ops
            }
            some = {name: dim for name, dim in dims.items() if name in inside}
            return replace(
                plan,
                strategy="co-shard",
                splits=(*plan.splits, *pattern.splits(micro, some, None, parts)),
                recompute=blocks if again else (),
            )

        share = len(blocks) / len(self.subject.blocks)
        size = self._size(mesh.pipeline * mesh.tensor) * (1 + (parts - 1) * share)
        count = f"{len(blocks)} of {len(self.subject.blocks)} blocks in {parts} parts"
        return _Wish(f"{_name('co-shard', ground, again)}, {count}", write, size)

    # One plan -------------------------------------------------------------------------------

    def _with_recompute(self, wish: Callable[[bool], _Wish]) -> None:
        """Keep everything if that fits, else recompute the blocks; as constraints allow."""
        allowed = self.constraints.recompute or ["needed", "all"]
        kept = None
        if "none" in allowed or "needed" in allowed:
            kept = self._try(wish(False))
        if kept is not None and self._is_far(kept):
            return
        if "all" in allowed or ("needed" in allowed and kept not in self.found):
            self._try(wish(True))

    def _is_far(self, one: Written) -> bool:
        """Whether the best is so much faster that nobody trades memory for this."""
        best = self.outer.frontier.best if self.outer is not None else None
        return best is not None and one.step_s > FAR * best.step_s

    def _try(self, wish: _Wish) -> Written | None:
        """Write and predict a plan; None where it cannot be, or is too much to predict."""
        if wish.size > self._left or (self.outer is not None and wish.size > _MOST):
            self.refused[wish.name] = "too many operators, ranks and parts to predict in a search"
            return None
        if (self.found or self.outer is not None) and time.monotonic() > self.deadline:
            self.stopped = True
            return None
        best = min((one.step_s for one in self.found), default=None)
        self.progress(wish.name, best)
        self.considered += 1
        self._left -= wish.size
        try:
            plan = predict.predict(
                wish.write(), self.subject, self.cluster, calibration=self.calibration
            )
        except (InfeasibleError, UsageError) as error:
            self.refused[wish.name] = str(error)
            return None
        assert plan.prediction is not None
        limit = int(min(self.limit_bytes, plan.prediction.memory_limit_bytes))
        plan = replace(plan, prediction=replace(plan.prediction, memory_limit_bytes=limit))
        written = Written(plan, wish.name)
        assert plan.prediction is not None
        (self.found if plan.prediction.fits else self.unfit).append(written)
        return written

    # What is allowed ------------------------------------------------------------------------

    def _allows(self, kind: str) -> bool:
        return self.constraints.plans is None or kind in self.constraints.plans

    def _orders(self, schedule: str) -> bool:
        """Whether constraints allow an order: of those outside the list of schedules, where plans
        are named.
        """
        wanted = self.constraints.schedules
        named = schedule in (self.constraints.plans or ())
        return wanted is None or schedule in wanted or named

    def _grounds(self, num_blocks: int) -> Iterator[Ground]:
        """Yield grounds that might be faster than what was found, states whole on every replica."""
        space = Space(
            self.cluster, self.num_ranks, self.subject.batch, num_blocks, self.constraints
        )
        ways = self.constraints.parameters
        best = self.outer.frontier.best if self.outer is not None else None
        for ground in space.grounds():
            if ground.mesh.data > 1 and ways is not None and "replicate" not in ways:
                continue
            squeezed = self.outer is None or self.outer.trials.squeezed
            if best is not None and squeezed and self.outer is not None:
                bound_s, _ = self.outer.bound(ground)
                if bound_s > best.step_s:
                    continue
            yield ground

    def _size(self, ranks: int) -> float:
        return float(len(self.subject.graph.ops) * ranks)


def _few(grounds: Sequence[Ground], key: Callable[[Ground], object]) -> list[Ground]:
    """Of grounds alike in `key`, in order, the one with the smallest microbatches."""
    found: dict[object, list[Ground]] = {}
    for ground in grounds:
        found.setdefault(key(ground), []).append(ground)
    return [min(several, key=lambda one: one.num_samples) for several in found.values()]


def _name(kind: str, ground: Ground, again: bool) -> str:
    recomputed = ", blocks recomputed" if again else ""
    return f"{kind}: {ground.mesh}, {cut(ground.microbatches, ground.num_samples)}{recomputed}"
