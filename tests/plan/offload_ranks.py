"""Run a step of each plan and say where its states are.

Called as: offload_ranks.py PLAN.json ... (through toolkit.plan.launch).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor

from toolkit.plan import io, runtime


def storage(value: torch.Tensor) -> int:
    part = value.to_local() if isinstance(value, DTensor) else value
    return part.untyped_storage().data_ptr()


def main() -> None:
    with runtime.session() as here:
        for path in sys.argv[1:]:
            plan = io.load(Path(path))
            lowered = runtime.prepare(plan, here)
            optimizer = torch.optim.AdamW(runtime.optimizer_groups(lowered), fused=True)
            batch = runtime.example(plan, here, batch=plan.provenance.sizes["batch"], seed=3)
            lowered.zero_gradients()
            lowered.step(batch)
            optimizer.step()
            lowered.after_update()
            updated = [value for group in optimizer.param_groups for value in group["params"]]
            moments = [optimizer.state[value]["exp_avg"] for value in updated]
            on_host = [*updated, *(value.grad for value in updated), *moments]
            assert all(value.device.type == "cpu" for value in on_host)
            held = {storage(value.detach()) for value in lowered.parameters.values()}
            if plan.offload == "optimizer":
                # Copies of their own, of this rank's half of everything.
                assert not held & {storage(value.detach()) for value in on_host}
                count = sum(value.numel() for value in lowered.parameters.values())
                assert abs(sum(value.numel() for value in updated) - count / 2) < 0.05 * count
            else:
                units = [m for m in lowered.module.modules() if isinstance(m, FSDPModule)]
                policies = {
                    type(unit._get_fsdp_state()._fsdp_param_group.offload_policy) for unit in units
                }
                assert policies == {CPUOffloadPolicy}, policies
                assert held == {storage(value.detach()) for value in updated}


if __name__ == "__main__":
    main()
    runtime.leave()
