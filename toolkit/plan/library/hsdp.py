"""Hybrid sharding (HSDP): sharded as FSDP2 inside a group of ranks, replicated between groups.

mesh        (replica r, data n / r): by default a node, or half of a single node's ranks, is a group
placements  every block and the root: shard, over data; what is reduce-scattered inside a group is
            all-reduced between groups
order       one stage: F B F B ... over the microbatches
"""

from __future__ import annotations

from dataclasses import replace

from toolkit.errors import InfeasibleError
from toolkit.hardware import Cluster
from toolkit.plan.library import fsdp
from toolkit.plan.plan import Axis, Plan
from toolkit.plan.subject import Subject


def plan(
    subject: Subject,
    cluster: Cluster,
    *,
    num_ranks: int | None = None,
    microbatches: int | None = None,
    recompute: bool = False,
    replica: int | None = None,
) -> Plan:
    """Return the plan over `num_ranks` ranks (default: the whole cluster) in `replica` groups.

    Raises InfeasibleError when the batch does not divide, or the ranks into groups of two or more.
    """
    size = num_ranks or cluster.num_devices
    groups = replica or max(2, len(cluster.by_node(range(size))))
    if groups < 2 or size % groups or size // groups < 2:
        raise InfeasibleError(
            f"{size} ranks do not make {groups} groups of at least 2 equal ones to shard inside",
            remedy="use 4 or more ranks that `replica` divides, or fsdp",
        )
    sharded = fsdp.plan(
        subject, cluster, num_ranks=size, microbatches=microbatches, recompute=recompute
    )
    return replace(
        sharded, strategy="hsdp", mesh=(Axis("replica", groups), Axis("data", size // groups))
    )
