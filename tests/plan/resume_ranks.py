"""Train two steps and save after the first; resume under another plan, and take the second again.

Called as: resume_ranks.py FOLDER PLAN.json PLAN.json (through toolkit.plan.launch).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from toolkit.plan import checkpoint, io, runtime
from toolkit.plan.lower.program import lower
from toolkit.plan.lower.recorder import Recorder


def main() -> None:
    folder, *paths = sys.argv[1:]
    losses: list[float] = []
    with runtime.session() as here:
        for resumes, path in enumerate(paths):
            plan = io.load(Path(path))
            module = runtime.build(plan, here)
            if resumes:
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.zero_()
            batch = runtime.example(plan, here, batch=plan.provenance.sizes["batch"], seed=3)
            mesh = runtime.mesh_of(plan, here)
            lowered = lower(plan, module, mesh, Recorder(here.rank), batch)
            optimizer = torch.optim.AdamW(lowered.parameters.values(), lr=1e-2, foreach=False)
            if resumes:
                last = checkpoint.latest(Path(folder))
                assert last is not None
                assert checkpoint.load(last, lowered, optimizer, {}) == 1
            for step in range(2):
                lowered.zero_gradients()
                loss = lowered.step(batch)
                losses.append(lowered.global_loss(loss))
                optimizer.step()
                if not resumes and not step:
                    checkpoint.save(Path(folder), 1, lowered, optimizer, {})
    first, second, again, _ = losses
    assert abs(first - second) > 1e-3, losses
    assert abs(second - again) < 1e-5 * abs(second), losses


if __name__ == "__main__":
    main()
    runtime.leave()
