"""Pipeline parallel, ZB-V (Qi et al. 2023, section 6): as ZB-H1, with two stages a position, down
the positions and back up: a microbatch's loss is where it began, and all positions hold alike.

mesh        (pipeline p, data n)
stages      2p runs of blocks; position d has d and 2p - 1 - d
order       no bubble when F, I and W take equal times
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

    Raises InfeasibleError when there are more stages than blocks, or the batch does not divide.
    """
    return pipeline.write(
        subject, cluster, "zb-v",
        num_ranks=num_ranks, microbatches=microbatches, recompute=recompute, data=data,
    )  # fmt: skip
