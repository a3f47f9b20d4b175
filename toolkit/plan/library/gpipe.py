"""Pipeline parallel, GPipe (Huang et al. 2019): all forwards, then all backwards.

mesh        (pipeline p, data n)
stages      p runs of blocks, one a position
order       F of every microbatch, then B of every microbatch, last first

Every stage holds all microbatches at once: with `recompute` that is what enters its blocks.
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
        subject, cluster, "gpipe",
        num_ranks=num_ranks, microbatches=microbatches, recompute=recompute, data=data,
    )  # fmt: skip
