"""Co-shard (SuperScaler, arXiv 2301.08984, section 2): split as tensor parallelism does, but keep
all parts on one device, one after another, and run each again just before its backward.

    mesh       (data n)
    splits     attention heads and the hidden features of feed-forwards, in `parts` parts, no axis
    recompute  the blocks: between co-shards a block keeps only what enters its two halves
    order      one stage: F B F B ... over the microbatches

Nothing is communicated for it. Only one part's activations are alive at a time, where recomputing a
whole block has all of them at once, for as many FLOPs.
"""

from __future__ import annotations

import math

from toolkit.errors import InfeasibleError
from toolkit.hardware import Cluster
from toolkit.ir.graph import OpGraph
from toolkit.plan.order import simple
from toolkit.plan.plan import Axis, Placement, Plan, Split, Stage
from toolkit.plan.program import pattern, regions
from toolkit.plan.subject import Subject

# Parts when none are asked for: the activations of a block shrink by this.
_PARTS = 4


def plan(
    subject: Subject,
    cluster: Cluster,
    *,
    num_ranks: int | None = None,
    microbatches: int | None = None,
    recompute: bool = True,
    parts: int | None = None,
) -> Plan:
    """Return the plan over `num_ranks` ranks (default: the whole cluster), every one a replica.

    `parts` is in how many parts heads and features run one after another (default: the most up to
    4 that divide them). Without `recompute` what lies between co-shards is kept. Raises
    InfeasibleError when nothing can be co-sharded, or `parts` does not divide it.
    """
    size = num_ranks or cluster.num_devices
    count = microbatches or 1
    micro = subject.graph.at(batch=subject.divided(size, count))
    return Plan(
        strategy="co-shard",
        provenance=subject.provenance(cluster),
        mesh=(Axis("data", size),),
        placements=tuple(Placement(path, "data", "replicate") for path in (*subject.blocks, "")),
        splits=splits(micro, parts),
        stages=(Stage(None, subject.blocks),),
        microbatches=count,
        schedule="1f1b",
        order=simple.one_f_one_b(1, count).rows,
        recompute=subject.blocks if recompute else (),
    )


def splits(graph: OpGraph, parts: int | None = None) -> tuple[Split, ...]:
    """Return the co-shards of every block of a microbatch's graph.

    Where tensor parallelism would split by columns and then rows (program/regions.py) the parts run
    one after another instead.
    """
    divides = math.gcd(*(region.degree for region in regions.regions(graph)))
    num = parts or max(n for n in range(1, min(divides, _PARTS) + 1) if divides % n == 0)
    if num == 1:
        raise InfeasibleError(
            f"heads and features of {graph.name} have no divisor in common to co-shard by",
            remedy="use recomputation of whole blocks",
        )
    return pattern.splits(graph, regions.dims(graph, num, "a number of co-shards of"), None, num)
