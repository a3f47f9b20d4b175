"""Predicting a plan: local shapes -> costs -> script -> simulated step, traffic, memory."""

from __future__ import annotations

from dataclasses import replace

from toolkit.cost.calibration import Calibration
from toolkit.errors import InfeasibleError
from toolkit.hardware import Cluster
from toolkit.ir.graph import OpGraph
from toolkit.plan.plan import Plan, Prediction
from toolkit.plan.predict import costs, events, local, memory, script, simulate, traffic
from toolkit.plan.subject import Subject

# Operators x ranks that are written out one by one.
_MOST_WRITTEN = 16384


def predict(
    plan: Plan, subject: Subject, cluster: Cluster, *, calibration: Calibration | None = None
) -> Plan:
    """Return the plan with its prediction on `cluster`.

    Raises InfeasibleError when the cluster has fewer devices than the plan has ranks.
    """
    check_fits(plan.num_ranks, cluster)
    made = scripted(plan, subject, cluster, calibration=calibration)
    model = costs.Costs(plan, cluster)
    run = simulate.run(events.tasks(made))
    flops = subject.model_flops
    host_bytes = memory.on_host(made)
    peak = sum(cluster.device(rank).peak(plan.provenance.dtype) for rank in range(plan.num_ranks))
    return replace(
        plan,
        prediction=Prediction(
            step_s=run.step_s,
            model_flops=flops,
            mfu=flops / (run.step_s * peak),
            bubble=run.bubble,
            memory_bytes=memory.peaks(made),
            memory_limit_bytes=min(
                cluster.device(rank).memory_bytes for rank in range(plan.num_ranks)
            ),
            traffic=traffic.predict(made),
            host_bytes=host_bytes,
            host_limit_bytes=_host_limit(model) if host_bytes else 0,
        ),
    )


def _host_limit(model: costs.Costs) -> int:
    """The least that a device has of its host's memory."""
    return min(model.host_bytes(position) for position in range(len(model.ranks)))


def simulated(
    plan: Plan, subject: Subject, cluster: Cluster, *, calibration: Calibration | None = None
) -> simulate.Run:
    """Return the simulated step itself, for its timeline."""
    made = scripted(plan, subject, cluster, calibration=calibration)
    run = simulate.run(events.tasks(made))
    return run.with_memory(memory.counters(made, run))


def scripted(
    plan: Plan, subject: Subject, cluster: Cluster, *, calibration: Calibration | None = None
) -> script.Script:
    """Return all that the plan's ranks do in one step, with its seconds on `cluster`."""
    model = costs.Costs(plan, cluster, calibration)
    whole = subject.graph.at(batch=plan.microbatch)
    if _is_executed(plan, whole):
        from toolkit.plan.predict import executed

        return executed.of(plan, whole, model)
    graph, calls = local.split(plan, whole, model)
    return script.of(plan, graph, calls, model)


def _is_executed(plan: Plan, graph: OpGraph) -> bool:
    """Whether the own executor runs the plan, and is small enough to be asked rank by rank.

    What only splits Linears between stages can be read off the placements, too: for thousands of
    devices that is done.
    """
    from toolkit.plan.lower import ladder

    if ladder.rung(plan) != "program":
        return False
    simple = not plan.splits and all(
        len(stage.devices) == 1 and not stage.no_grad for stage in plan.stages
    )
    ranks = plan.num_ranks // plan.num_replicas
    return not simple or ranks * len(graph.ops) <= _MOST_WRITTEN


def check_fits(num_ranks: int, cluster: Cluster) -> None:
    """Raise InfeasibleError when a plan needs more devices than there are."""
    if num_ranks > cluster.num_devices:
        raise InfeasibleError(
            f"the plan needs {num_ranks} devices and {cluster.name} has {cluster.num_devices}",
            remedy=f"use {cluster.num_devices} ranks or fewer, or a larger cluster",
        )
