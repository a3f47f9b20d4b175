"""FSDP2 over tensor parallel: Linears split inside a node, everything sharded between nodes.

mesh        (data n / t, tensor t): by default t is the largest degree up to a node's devices
placements  columns and rows as in Megatron over tensor; every block and the root: shard over data
order       one stage: F B F B ... over the microbatches
"""

from __future__ import annotations

from dataclasses import replace

from toolkit.errors import InfeasibleError
from toolkit.hardware import Cluster
from toolkit.plan import chain, transform
from toolkit.plan.library import fsdp, megatron
from toolkit.plan.plan import Axis, Plan
from toolkit.plan.subject import Subject


def plan(
    subject: Subject,
    cluster: Cluster,
    *,
    num_ranks: int | None = None,
    microbatches: int | None = None,
    recompute: bool = False,
    tensor: int | None = None,
) -> Plan:
    """Return the plan over `num_ranks` ranks (default: the whole cluster), `tensor` of them
    splitting each Linear.

    Raises InfeasibleError when batch, heads or features do not divide, or ranks are too few.
    """
    size = num_ranks or cluster.num_devices
    degree = tensor or _degree(subject, cluster, size)
    if size % degree or degree < 2 or size // degree < 2:
        raise InfeasibleError(
            f"{size} ranks do not make a mesh of data and tensor, each at least 2",
            remedy="use 4 or more ranks that the tensor degree divides, or fsdp or tp alone",
        )
    split = megatron.plan(subject, cluster, num_ranks=degree)
    sharded = fsdp.plan(
        subject, cluster, num_ranks=size // degree, microbatches=microbatches, recompute=recompute
    )
    return replace(
        sharded,
        strategy="fsdp-tp",
        mesh=(Axis("data", size // degree), Axis("tensor", degree)),
        placements=(*split.placements, *sharded.placements),
    )


def _degree(subject: Subject, cluster: Cluster, num_ranks: int) -> int:
    """The largest degree that splits every region and leaves two ranks for data."""
    found = transform.regions(subject.graph, chain.segments(subject.graph), 1)
    node = min(len(places) for places in cluster.by_node(range(num_ranks)).values())
    return max(
        degree
        for degree in range(1, min(node, num_ranks // 2 or 1) + 1)
        if num_ranks % degree == 0 and all(region.largest_degree % degree == 0 for region in found)
    )
