"""What each rank runs to time plans.

python -m toolkit.plan.measure.ranks found.jsonl runs.json
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from toolkit.errors import ToolkitError
from toolkit.plan import io, runtime
from toolkit.plan.plan import Plan
from toolkit.plan.runtime import Session

# The first steps set up connections and the optimizer's states.
_WARM_UP_STEPS, _TIMED_STEPS = 2, 3


def run_rank(plan: Plan, here: Session) -> float:
    """Return the median seconds of this rank's training steps."""
    batch = runtime.example(plan, here, batch=plan.provenance.sizes["batch"], seed=plan.seed + 1)
    lowered = runtime.prepare(plan, here)
    optimizer = torch.optim.AdamW(runtime.optimizer_groups(lowered))
    seconds = []
    for number in range(_WARM_UP_STEPS + _TIMED_STEPS):
        runtime.synchronise(lowered)
        started_s = time.perf_counter()
        lowered.zero_gradients()
        lowered.step(batch)
        optimizer.step()
        lowered.after_update()
        if here.device.type == "cuda":
            torch.cuda.synchronize(here.device)
        dist.barrier()
        if number >= _WARM_UP_STEPS:
            seconds.append(time.perf_counter() - started_s)
    return statistics.median(seconds)


def main(arguments: Sequence[str]) -> None:
    out, work = Path(arguments[0]), Path(arguments[1])

    def answer(path: str, here: Session) -> dict[str, Any]:
        return {"step_s": run_rank(io.load(Path(path)), here)}

    runtime.answer_all(work, out, answer)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ToolkitError as error:
        sys.exit(str(error))  # the parent shows it as what this rank printed
    runtime.leave()
