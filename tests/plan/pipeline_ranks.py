"""What each rank runs in test_pipeline.py: report.json dtype plan.pickle ...

For every plan: parity of the loss and all gradients with one device, twice (a second step finds
what the first left behind), and what the second step communicated, by position.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from toolkit.plan import parity, runtime
from toolkit.plan.counting import Counter
from toolkit.plan.lower import ladder


def run(plan, here, dtype: torch.dtype) -> dict:
    batch = runtime.example(plan, here, batch=plan.provenance.sizes["batch"], seed=plan.seed + 1)
    if dtype == torch.float64:
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    want = parity.reference(runtime.build(plan, here, dtype), batch)
    lowered = runtime.prepare(plan, here, dtype=dtype)
    for _ in range(2):
        lowered.zero_gradients()
        lowered.recorder.reset()
        with Counter() as counter:
            loss = lowered.step(batch)
    found = parity.compare(lowered, loss, want)
    gathered = [None] * here.num_ranks
    mine = {
        "position": plan.along("pipeline", here.rank).index(here.rank),
        "calls": counter.calls,
        "held": sorted(lowered.parameters),
        "ran": [span.name for span in lowered.recorder.spans if span.name[0].isdigit()],
    }
    dist.all_gather_object(gathered, mine)
    return {
        "rung": lowered.rung,
        "expected": ladder.rung(plan),
        "loss_error": found.loss_error,
        "gradient_error": found.gradient_error,
        "worst": found.worst_gradient,
        "num_gradients": found.num_gradients,
        "missing": found.missing,
        "ranks": gathered,
    }


def main() -> None:
    out, dtype, *paths = sys.argv[1:]
    with runtime.session() as here:
        reports = [
            run(pickle.loads(Path(path).read_bytes()), here, getattr(torch, dtype))
            for path in paths
        ]
    if here.rank == 0:
        Path(out).write_text(json.dumps(reports))


if __name__ == "__main__":
    main()
    runtime.leave()
