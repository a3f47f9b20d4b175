"""Which ranks meet, and which part of the batch a rank sees."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from toolkit.plan.plan import AxisName, Plan


def along(plan: Plan, axes: tuple[AxisName, ...], mesh: DeviceMesh) -> dist.ProcessGroup:
    """Return the group of the ranks that differ from this one along `axes` alone.

    All ranks must call this: along several axes at once it makes new groups.
    """
    present = [axis.name for axis in plan.mesh if axis.name in axes and axis.size > 1]
    if len(present) < 2:
        here = present or [axis.name for axis in plan.mesh if axis.name in axes]
        group: dist.ProcessGroup = mesh.get_group(here[0])
        return group
    sets = {members(plan, axes, rank) for rank in range(plan.num_ranks)}
    own, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in sorted(sets)])
    assert own is not None
    return own


def members(plan: Plan, axes: tuple[AxisName, ...], rank: int) -> tuple[int, ...]:
    """Return the ranks that differ from `rank` along `axes` alone, in order."""
    found = [rank]
    for axis in axes:
        found = [other for one in found for other in plan.along(axis, one)]
    return tuple(sorted(found))


def replica(plan: Plan, rank: int) -> int:
    """Return which part of the batch `rank` sees, of `plan.num_replicas`."""
    return plan.along("replica", rank).index(rank) * plan.size("data") + plan.along(
        "data", rank
    ).index(rank)
