"""What each rank of a program test runs: plans on the own executor, compared with one device.

Called as: program_ranks.py OUT DTYPE PLAN.json... (through toolkit.plan.launch).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from toolkit.plan import io, parity, runtime
from toolkit.plan.counting import Counter
from toolkit.plan.lower.program.lowered import lower
from toolkit.plan.lower.recorder import Recorder


def one(path: str, here: Any, dtype: torch.dtype) -> dict[str, Any]:
    plan = io.load(Path(path))
    batch = runtime.example(plan, here, batch=plan.provenance.sizes["batch"], seed=plan.seed + 1)
    batch = {n: v.to(dtype) if v.is_floating_point() else v for n, v in batch.items()}
    module = runtime.build(plan, here, dtype)
    want = parity.reference(module, batch)
    lowered = lower(plan, module, runtime.mesh_of(plan, here), Recorder(here.rank), batch)
    lowered.step(batch)
    lowered.zero_gradients()
    with Counter() as counter:
        loss = lowered.step(batch)
    found = parity.compare(lowered, loss, want)
    gathered: list[Any] = [None] * here.num_ranks
    dist.all_gather_object(gathered, counter.calls)
    return {
        "rung": lowered.rung,
        "parity": dataclasses.asdict(found),
        "counted": gathered,
        "actions": [span.name for span in lowered.recorder.spans],
    }


def main() -> None:
    out, dtype, *paths = sys.argv[1:]
    with runtime.session() as here:
        found = [one(path, here, getattr(torch, dtype)) for path in paths]
    if here.rank == 0:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    runtime.leave()
