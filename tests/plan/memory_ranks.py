"""One rank that measures a step's activations under plans: memory_ranks.py OUT PLAN.json...

Each plan runs on the own executor; one whose strategy is "whole" or "layers" is run by torch, the
model as it is or with each block under torch.utils.checkpoint.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from live_bytes import LiveBytes
from torch.utils.checkpoint import checkpoint

from toolkit.plan import io, runtime
from toolkit.plan.lower.lowered import loss_of
from toolkit.plan.lower.program import lower
from toolkit.plan.lower.recorder import Recorder


def stepper(plan: Any, here: Any) -> tuple[Callable[[], None], Callable[[], list[Any]]]:
    batch = runtime.example(plan, here, batch=plan.provenance.sizes["batch"], seed=1)
    module = runtime.build(plan, here)
    if plan.strategy in ("whole", "layers"):
        for path in plan.stages[0].blocks if plan.strategy == "layers" else ():
            block = module.get_submodule(path)
            block.forward = _again(block.forward)  # type: ignore[method-assign]

        def run() -> None:
            module.zero_grad(set_to_none=True)
            loss_of(module(**batch)).backward()

        return run, lambda: [parameter.grad for parameter in module.parameters()]
    lowered = lower(plan, module, runtime.mesh_of(plan, here), Recorder(0), batch)

    def step() -> None:
        lowered.zero_gradients()
        lowered.step(batch)

    return step, lambda: [parameter.grad for parameter in lowered.parameters.values()]


def _again(forward: Any) -> Any:
    return lambda *args: checkpoint(forward, *args, use_reentrant=False)


def main() -> None:
    out, repeats, *paths = sys.argv[1:]
    with runtime.session() as here:
        torch.set_num_threads(1)
        plans = [io.load(Path(path)) for path in paths]
        runs = [stepper(plan, here) for plan in plans]
        peaks = []
        for step, gradients in runs:
            step()
            with LiveBytes() as live:
                step()
            peaks.append(live.peak(gradients()))
        seconds: list[list[float]] = [[] for _ in runs]
        for _ in range(int(repeats)):
            for index, (step, _gradients) in enumerate(runs):
                start_s = time.perf_counter()
                step()
                seconds[index].append(time.perf_counter() - start_s)
    found = [{"peak": peak, "seconds": some} for peak, some in zip(peaks, seconds, strict=True)]
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
