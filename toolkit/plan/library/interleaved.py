"""Pipeline parallel, interleaved 1F1B (Narayanan et al. 2021): two stages a position, so that the
bubble is half of 1F1B's, for twice the messages.

mesh        (pipeline p, data n)
stages      2p runs of blocks; position d has d and p + d
order       1F1B over both, p microbatches of a stage at a time
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
    p does not divide the microbatches.
    """
    return pipeline.write(
        subject, cluster, "interleaved",
        num_ranks=num_ranks, microbatches=microbatches, recompute=recompute, data=data,
    )  # fmt: skip
