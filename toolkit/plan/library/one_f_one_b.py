"""Pipeline parallel, 1F1B: consecutive blocks on each rank, microbatches flowing through them.

mesh        (pipeline p, data n)
stages      p runs of blocks, one a position
order       stage s: p - s forwards, then one backward and one forward in turn, then the rest
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
        subject, cluster, "1f1b",
        num_ranks=num_ranks, microbatches=microbatches, recompute=recompute, data=data,
    )  # fmt: skip
