"""The ladder's last rung: an own executor, one process a rank, for plans torch cannot express.

Reading order: write.py (which rank runs which part), exchange.py (how tensors get there),
outline.py, items.py and script.py (what one rank does, as data), sides.py, walk.py and reduce.py
(who communicates what when), local.py (all that as a prediction takes it); then with torch
kernel.py, move.py, weights.py, executor.py and lowered.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from toolkit.ir.graph import OpGraph
    from toolkit.plan.lower.lowered import Batch, Lowered
    from toolkit.plan.lower.recorder import Recorder
    from toolkit.plan.plan import Plan


def lower(
    plan: Plan,
    module: nn.Module,
    mesh: DeviceMesh,
    recorder: Recorder,
    example: Batch,
    graph: OpGraph | None = None,
) -> Lowered:
    """Return what this rank runs of `plan` on the own executor; see lowered.lower."""
    from toolkit.plan.lower.program import lowered  # the rest of the package needs no torch

    return lowered.lower(plan, module, mesh, recorder, example, graph)
