"""Pipeline parallel, DualPipe folded into a V (DeepSeek-V3, 2024): a forward of one of a position's
two stages and a backward of the other follow each other, and one's messages hide behind the other.

mesh        (pipeline p, data n)
stages      2p runs of blocks; position d has d and 2p - 1 - d
order       needs at least 2p microbatches
"""

from __future__ import annotations

from toolkit.hardware import Cluster
from toolkit.plan.library import pipeline
from toolkit.plan.plan import Plan
from toolkit.plan.subject import Subject


def plan(
    subject: Subject,
    cluster: Cluster,
    *,
    num_ranks: int | None = None,
    microbatches: int | None = None,
    recompute: bool = False,
    data: int = 1,
) -> Plan:
    """Return the plan over `num_ranks` ranks (default: the whole cluster), `data` in each position.

    Raises InfeasibleError when there are more stages than blocks, the batch does not divide, or
    there are fewer than 2p microbatches.
    """
    return pipeline.write(
        subject, cluster, "dualpipe-v",
        num_ranks=num_ranks, microbatches=microbatches, recompute=recompute, data=data,
    )  # fmt: skip
