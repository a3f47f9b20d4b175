"""Predicting a plan: trace -> local shapes -> costs -> simulated step, memory and traffic."""

from __future__ import annotations

from dataclasses import replace

from toolkit.cost.calibration import Calibration
from toolkit.errors import InfeasibleError
from toolkit.hardware import Cluster
from toolkit.ir.graph import OpGraph
from toolkit.plan import chain, costs, events, memory, simulate, traffic, transform
from toolkit.plan.plan import Plan, Prediction
from toolkit.plan.subject import Subject


def predict(
    plan: Plan, subject: Subject, cluster: Cluster, *, calibration: Calibration | None = None
) -> Plan:
    """Return the plan with its prediction on `cluster`.

    Raises InfeasibleError when the cluster has fewer devices than the plan has ranks.
    """
    check_fits(plan.num_ranks, cluster)
    whole, local, regions = shapes(plan, subject)
    run = simulate.run(events.tasks(plan, costs.Costs(plan, local, regions, cluster, calibration)))
    flops = costs.model_flops(subject.graph)
    peak = sum(cluster.device(rank).peak(plan.provenance.dtype) for rank in range(plan.num_ranks))
    return replace(
        plan,
        prediction=Prediction(
            step_s=run.step_s,
            model_flops=flops,
            mfu=flops / (run.step_s * peak),
            bubble=run.bubble,
            memory_bytes=tuple(
                {name: round(size) for name, size in ledger.by_category.items()}
                for ledger in memory.ledgers(plan, local, cluster)
            ),
            memory_limit_bytes=min(
                cluster.device(rank).memory_bytes for rank in range(plan.num_ranks)
            ),
            traffic=traffic.predict(plan, whole, regions),
        ),
    )


def simulated(
    plan: Plan, subject: Subject, cluster: Cluster, *, calibration: Calibration | None = None
) -> simulate.Run:
    """Return the simulated step itself, for its timeline."""
    _, local, regions = shapes(plan, subject)
    return simulate.run(events.tasks(plan, costs.Costs(plan, local, regions, cluster, calibration)))


def shapes(plan: Plan, subject: Subject) -> tuple[OpGraph, OpGraph, tuple[transform.Region, ...]]:
    """Return the graph of one rank's microbatch, whole and as split, and its split regions."""
    whole = subject.graph.at(batch=plan.microbatch)
    num_tensor = plan.size("tensor")
    if num_tensor == 1:
        return whole, whole, ()
    regions = transform.regions(whole, chain.segments(whole), num_tensor)
    return whole, transform.local(whole, regions, num_tensor), regions


def check_fits(num_ranks: int, cluster: Cluster) -> None:
    """Raise InfeasibleError when a plan needs more devices than there are."""
    if num_ranks > cluster.num_devices:
        raise InfeasibleError(
            f"the plan needs {num_ranks} devices and {cluster.name} has {cluster.num_devices}",
            remedy=f"use {cluster.num_devices} ranks or fewer, or a larger cluster",
        )
