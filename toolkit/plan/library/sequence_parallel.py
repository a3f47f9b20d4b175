"""Tensor parallel with sequence parallel: between split regions each rank holds 1/n of the tokens.

mesh        (tensor n)
placements  columns and rows as in Megatron; every block: sequence, and in it what mixes tokens
            and is no region, which is computed whole
order       one stage: F B F B ... over the microbatches; gathers and reduce-scatters lie inside

Where the split by tokens can be followed is read off the graph (sequence.py).
"""

from __future__ import annotations

from dataclasses import replace

from toolkit.hardware import Cluster
from toolkit.plan import chain, sequence, transform
from toolkit.plan.library import megatron
from toolkit.plan.plan import Placement, Plan
from toolkit.plan.subject import Subject


def plan(
    subject: Subject,
    cluster: Cluster,
    *,
    num_ranks: int | None = None,
    microbatches: int | None = None,
    recompute: bool = False,
) -> Plan:
    """Return the plan over `num_ranks` ranks (default: the whole cluster).

    Raises InfeasibleError when the degree does not divide heads, features or tokens, or a block
    does something with tokens that cannot be followed.
    """
    split = megatron.plan(
        subject, cluster, num_ranks=num_ranks, microbatches=microbatches, recompute=recompute
    )
    return replace(split, strategy="tp-sp", placements=(*split.placements, *placed(subject, split)))


def placed(subject: Subject, split: Plan) -> tuple[Placement, ...]:
    """Return the placements that split a tensor-parallel plan's activations by tokens."""
    degree = split.size("tensor")
    regions = transform.regions(subject.graph, chain.segments(subject.graph), degree)
    return tuple(
        Placement(module, "tensor", "sequence")
        for run in sequence.runs(subject.graph, regions, degree)
        for module in run.modules
    )
