"""The fastest few of a search, written as plans and predicted in full."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from toolkit.errors import UsageError
from toolkit.plan import planner, predict
from toolkit.plan.library import megatron, sequence_parallel
from toolkit.plan.plan import Placement, Plan
from toolkit.plan.search import write
from toolkit.plan.search.bench import MEGATRON, TOKENS, WHOLE
from toolkit.plan.search.extras import Written
from toolkit.plan.search.frontier import Candidate
from toolkit.plan.search.outer import Outer
from toolkit.plan.subject import Subject

# So many are predicted in full at least, and ranked by that.
FEWEST = 4
# What is predicted to take at most this much more than the fastest may be as fast.
NEARLY = 1.1
# Operators times ranks that are predicted one by one.
_MOST_WRITTEN = 4096


@dataclass(frozen=True)
class Finalist:
    """A plan predicted in full, what it was made from, and the seconds it is ranked by."""

    plan: Plan
    candidate: Candidate | Written
    step_s: float

    @property
    def predicted_s(self) -> float:
        """The prediction alone."""
        assert self.plan.prediction is not None
        return self.plan.prediction.step_s


def finalists(
    outer: Outer, limit: float, count: int = FEWEST, *, varied: bool = False
) -> list[Finalist]:
    """Predict the fastest `count` in full, and of the others until one fits; return those that fit,
    the fastest first. `varied`: of those nearly as fast as the fastest, first one of each size of
    microbatches on each mesh.

    Where operators are split, a prediction prices one that reads a tensor whole at the shape the
    tensor is made in, a part: there the estimate is heeded, too. Raises InfeasibleError when only
    estimates fit.
    """
    found: list[Finalist] = []
    frontier = outer.frontier
    fastest = _varied(frontier.fastest) if varied else frontier.fastest
    tried = {id(one): one for one in (*fastest, *frontier.members)}.values()
    for place, candidate in enumerate(tried):
        if place >= count and any(_fits(one.plan) for one in found):
            break
        plan = written(candidate, outer)
        assert plan.prediction is not None
        plan = replace(plan, prediction=replace(plan.prediction, memory_limit_bytes=int(limit)))
        assert plan.prediction is not None
        step_s = plan.prediction.step_s
        if candidate.split != WHOLE:
            step_s = max(step_s, candidate.step_s)
        found.append(Finalist(plan, candidate, step_s))
    fitting = [one for one in found if _fits(one.plan)]
    if not fitting:
        planner.check_memory(min(found, key=lambda one: _peak_bytes(one.plan)).plan)
    return sorted(fitting, key=lambda one: one.step_s)


def _varied(fastest: Sequence[Candidate]) -> list[Candidate]:
    """Candidates in order of time, those whose mesh and microbatches had no other before them first
    where they are nearly as fast as the fastest.
    """
    met: Counter[object] = Counter()
    turns = []
    for one in fastest:
        key = (one.mesh, one.num_samples, one.schedule)
        far = one.step_s > NEARLY * fastest[0].step_s
        turns.append((far, met[key], one.step_s))
        met[key] += 1
    order = sorted(range(len(turns)), key=turns.__getitem__)
    return [fastest[place] for place in order]


def written(candidate: Candidate, outer: Outer) -> Plan:
    """Return a candidate's plan, predicted in full; with the search's own estimate where operators
    are split on more ranks than prediction writes out one by one.
    """
    subject, cluster = outer.subject, outer.cluster
    made = write.plan(candidate, outer.outline, subject, cluster, _placed(candidate, subject))
    ranks = candidate.mesh.pipeline * candidate.mesh.inner
    if made.splits and ranks * len(subject.graph.ops) > _MOST_WRITTEN:
        return write.estimated(made, candidate, subject, cluster)
    try:
        return predict.predict(made, subject, cluster, calibration=outer.calibration)
    except UsageError:
        if outer.constraints.runnable:
            raise
        # Nothing runs it, so nothing predicts it rank by rank either.
        return write.estimated(made, candidate, subject, cluster)


def _placed(candidate: Candidate, subject: Subject) -> tuple[Placement, ...] | None:
    """What places modules over the tensor axis; None where operators are split one by one."""
    if candidate.split == WHOLE:
        return ()
    if candidate.split not in (MEGATRON, TOKENS):
        return None
    split = megatron.plan(subject, candidate.stack.cluster, num_ranks=candidate.mesh.tensor)
    tokens = sequence_parallel.placed(subject, split) if candidate.split == TOKENS else ()
    return (*split.placements, *tokens)


def _fits(plan: Plan) -> bool:
    return plan.prediction is not None and plan.prediction.fits


def _peak_bytes(plan: Plan) -> int:
    assert plan.prediction is not None
    return plan.prediction.peak_bytes
