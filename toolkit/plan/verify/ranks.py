"""What each rank runs to verify plans.

python -m toolkit.plan.verify.ranks reports.jsonl jobs.json [--measure]
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.plan import counting, io, parity, runtime, tracking
from toolkit.plan.lower.lowered import Batch, Lowered
from toolkit.plan.plan import Plan, Traffic
from toolkit.plan.runtime import Session
from toolkit.plan.verify.report import MemoryRow, Report, compare_traffic, to_json

# Steps before the counted one: the first sets up connections and pipelining's handshake.
_WARM_UP_STEPS = 1
_TIMED_STEPS = 3
# Of the AdamW step that is compared; large, so that rounding does not hide a wrong update.
_LEARNING_RATE, _WEIGHT_DECAY = 0.1, 0.1


@dataclass(frozen=True)
class Update:
    """One AdamW step on one device: each trained parameter's change, and the epsilon it took."""

    changes: Mapping[str, Tensor]
    epsilon: float


def one_update(module: nn.Module, gradients: Mapping[str, Tensor]) -> Update:
    """Update `module` with these gradients.

    Epsilon is the root mean square of all gradients: with a tiny one, AdamW's first step is the
    sign of the gradient, and for gradients that are zero but for rounding a coin decides.
    """
    count = sum(gradient.numel() for gradient in gradients.values())
    square = sum(float(gradient.norm()) ** 2 for gradient in gradients.values())
    epsilon = math.sqrt(square / count)
    trained = {name: found for name, found in module.named_parameters() if name in gradients}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    for name, parameter in trained.items():
        parameter.grad = gradients[name]
    _adamw([{"params": [*trained.values()]}], epsilon).step()
    changes = {name: found.detach() - before[name] for name, found in trained.items()}
    return Update(changes, epsilon)


def _adamw(groups: list[dict[str, Any]], epsilon: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY, eps=epsilon)


def compare_update(
    lowered: Lowered, before: Mapping[str, Tensor], want: Update, here: Session
) -> tuple[float, str]:
    """Return the largest error of a parameter's change, and that parameter. All ranks must call
    this. Parameters that no gradient reaches on one device are not compared.
    """
    norm = math.sqrt(sum(float(change.norm()) ** 2 for change in want.changes.values()))
    errors = {
        name: parity.error(value - before[name], want.changes[name], norm)
        for name, value in lowered.whole_parameters()
        if name in want.changes
    }
    gathered: list[dict[str, float]] = [{} for _ in range(here.num_ranks)]
    dist.all_gather_object(gathered, errors)
    missing = set(want.changes) - {name for found in gathered for name in found}
    if missing:
        return math.inf, min(missing)
    return max((value, name) for found in gathered for name, value in found.items())


def run_rank(plan: Plan, here: Session, dtype: str, *, measure: bool) -> Report:
    """Verify one plan on this rank; every rank returns the same report."""
    torch_dtype = getattr(torch, dtype)
    earlier = _alive() if measure else []  # of plans before: autograd's hooks keep some for ever
    batch = runtime.example(
        plan, here, batch=plan.provenance.sizes["batch"], seed=plan.seed + 1, dtype=torch_dtype
    )
    module = runtime.build(plan, here, torch_dtype)
    before = {name: found.detach().clone() for name, found in module.named_parameters()}
    want = parity.reference(module, batch)
    update = one_update(module, want.gradients)
    del module
    lowered = runtime.prepare(plan, here, dtype=torch_dtype)
    for _ in range(_WARM_UP_STEPS):
        lowered.zero_gradients()
        lowered.step(batch)
    lowered.zero_gradients()
    with counting.Counter() as counter:
        loss = lowered.step(batch)
    found = parity.compare(lowered, loss, want)
    optimizer = _adamw(runtime.optimizer_groups(lowered), update.epsilon)
    optimizer.step()
    lowered.after_update()
    update_error, worst_update = compare_update(lowered, before, update, here)
    traffic, faults = _communication(plan, here, counter, torch_dtype.itemsize)
    del before, want, update
    measured = _measure(plan, here, lowered, optimizer, batch, earlier) if measure else ((), None)
    assert plan.prediction is not None
    return Report(
        strategy=plan.strategy,
        rung=lowered.rung,
        dtype=dtype,
        parity=found,
        update_error=update_error,
        worst_update=worst_update,
        traffic=compare_traffic(*traffic),
        faults=faults,
        memory=measured[0] if dtype == plan.provenance.dtype else (),
        predicted_step_s=plan.prediction.step_s,
        measured_step_s=measured[1],
    )


def _communication(
    plan: Plan, here: Session, counter: counting.Counter, itemsize: int
) -> tuple[tuple[list[Traffic], list[dict[str, tuple[int, int]]]], tuple[str, ...]]:
    """What was predicted and counted at each position, and where ranks do not fit together."""
    gathered: list[Any] = [None] * here.num_ranks
    dist.all_gather_object(gathered, (counter.calls, counter.log))
    faults = list(counting.faults([log for _, log in gathered]))
    counted: list[dict[str, tuple[int, int]]] = []
    for position, first in enumerate(plan.along("pipeline")):
        counted.append(gathered[first][0])
        faults += [
            f"ranks {first} and {rank} of position {position} communicate differently: "
            f"{gathered[first][0]} and {gathered[rank][0]}"
            for rank in range(here.num_ranks)
            if _position(plan, rank) == position and gathered[rank][0] != gathered[first][0]
        ][:1]
    assert plan.prediction is not None
    scale = itemsize / getattr(torch, plan.provenance.dtype).itemsize
    predicted = [
        Traffic(row.position, row.kind, row.count, int(row.num_bytes * scale))
        for row in plan.prediction.traffic
    ]
    return (predicted, counted), tuple(faults)


def _position(plan: Plan, rank: int) -> int:
    return plan.along("pipeline", rank).index(rank)


def _measure(
    plan: Plan,
    here: Session,
    lowered: Lowered,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    earlier: Sequence[Tensor],
) -> tuple[tuple[MemoryRow, ...], float]:
    """Track one training step's memory, then time a few; the update belongs to both. Tensors
    `earlier` there and the batch are not the plan's.
    """
    others = {id(value.untyped_storage()) for value in (*earlier, *batch.values())}
    tracker = tracking.Tracker()
    tracker.watch(found for found in _alive() if id(found.untyped_storage()) not in others)
    with tracker:
        _train(lowered, optimizer, batch)
    seconds = []
    for _ in range(_TIMED_STEPS):
        runtime.synchronise(lowered)
        started_s = time.perf_counter()
        _train(lowered, optimizer, batch)
        seconds.append(time.perf_counter() - started_s)
    gathered: list[Any] = [None] * here.num_ranks
    dist.all_gather_object(gathered, (tracker.peak_bytes, statistics.median(seconds)))
    assert plan.prediction is not None
    rows = tuple(
        MemoryRow(
            position,
            sum(predicted.values()),
            max(
                peak for rank, (peak, _) in enumerate(gathered) if _position(plan, rank) == position
            ),
        )
        for position, predicted in enumerate(plan.prediction.memory_bytes)
    )
    return rows, max(found for _, found in gathered)


def _alive() -> list[Tensor]:
    """The tensors with memory that Python knows of; between steps there are no others."""
    gc.collect()
    return [
        found
        for found in gc.get_objects()
        if type(found) in (Tensor, nn.Parameter) and found.device.type != "meta"
    ]


def _train(lowered: Lowered, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    lowered.zero_gradients()
    lowered.step(batch)
    optimizer.step()
    lowered.after_update()


def main(arguments: Sequence[str]) -> None:
    out, work = Path(arguments[0]), Path(arguments[1])

    def answer(job: dict[str, str], here: Session) -> dict[str, Any]:
        plan, measure = io.load(Path(job["plan"])), "--measure" in arguments
        return to_json(run_rank(plan, here, job["dtype"], measure=measure))

    runtime.answer_all(work, out, answer)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ToolkitError as error:
        sys.exit(str(error))  # the parent shows it as what this rank printed
    runtime.leave()
