"""Pipeline parallel, ZB-H1 (Qi et al. 2023): backward in two halves. Only the gradient of a stage's
input (I) is waited for by the stage before; the gradients of the weights (W) fill what was bubble.

mesh        (pipeline p, data n)
stages      p runs of blocks, one a position
order       as 1F1B, with W s microbatches after I on stage s; it holds what 1F1B holds
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
        subject, cluster, "zb-h1",
        num_ranks=num_ranks, microbatches=microbatches, recompute=recompute, data=data,
    )  # fmt: skip
