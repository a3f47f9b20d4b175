"""The ladder: which rung runs a plan.

native    FSDP2, DTensor and buckets of gradients: plans without stages or splits of operators
schedule  torch's pipeline runtime with the plan's own table: stages, one a position
program   our executor: splits of operators, stages on several positions or without gradients,
          pipelines whose stages are split over tensor or context
Over any of them the optimizer may be on the host (host.py).
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from toolkit.errors import UsageError
from toolkit.plan.check import offload_fault
from toolkit.plan.lower.lowered import Batch, Lowered
from toolkit.plan.lower.recorder import Recorder
from toolkit.plan.plan import Plan

_MODULES = {
    "native": "toolkit.plan.lower.native",
    "schedule": "toolkit.plan.lower.pipeline",
    "program": "toolkit.plan.lower.program",
}


def rung(plan: Plan) -> str:
    """Return "native", "schedule" or "program"."""
    split = plan.size("tensor") > 1 or plan.size("context") > 1
    several = any(len(stage.devices) > 1 or stage.no_grad for stage in plan.stages)
    pipelined = plan.size("pipeline") > 1 or len(plan.stages) > 1
    if plan.splits or several or (split and pipelined):
        return "program"
    return "schedule" if pipelined else "native"


def lower(
    plan: Plan, module: nn.Module, mesh: DeviceMesh, recorder: Recorder, example: Batch
) -> Lowered:
    """Return what this rank runs of `plan`.

    `module` is the whole model with equal weights on every rank; `example` is one microbatch.
    Raises UsageError for a plan that its rung cannot run.
    """
    # Imported when needed: a rung's own imports are heavy.
    fault = offload_fault(plan)
    if fault is not None:
        raise UsageError(fault[0], remedy=fault[1])
    lowering: Any = importlib.import_module(_MODULES[rung(plan)])
    lowered: Lowered = lowering.lower(plan, module, mesh, recorder, example)
    if plan.offload == "optimizer":
        from toolkit.plan.lower.host import OnHost

        return OnHost(lowered)
    return lowered
