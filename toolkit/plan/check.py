"""Whether a plan can be run at all: its mesh, its stages, and its table of actions."""

from __future__ import annotations

from collections import Counter

from toolkit.errors import FormatError, UsageError
from toolkit.plan.order import deadlock
from toolkit.plan.order.action import KINDS, Action
from toolkit.plan.plan import DATA_WAYS, Plan

_SHOWN = 3


def check(plan: Plan, *, where: str = "plan") -> None:
    """Raise FormatError unless every stage runs every microbatch once where it belongs, all devices
    run what they share in one order, and none waits for ever.
    """
    _mesh(plan, where)
    _stages(plan, where)
    _complete(plan, where)
    fault = offload_fault(plan)
    if fault is not None:
        raise FormatError(f"{where}: {fault[0]}", remedy=fault[1])
    try:
        problem = plan.table.problem()
    except UsageError as error:
        raise FormatError(f"{where}: order: {error}") from error
    faults = deadlock.find(problem, plan.order)
    if faults:
        shown = "; ".join(map(str, faults[:_SHOWN]))
        raise FormatError(f"{where}: the order cannot run: {shown}")


def offload_fault(plan: Plan) -> tuple[str, str] | None:
    """Return why no rung runs the plan's offload, and what to do about it; None where one does.

    The optimizer's update may be on the host under any plan. Parameters are FSDP2's to offload.
    """
    if plan.offload != "parameters":
        return None
    remedy = "offload the optimizer alone, or"
    ways = [how for how in DATA_WAYS if plan.placed(how)]
    if ways != ["shard"]:
        given = f"as {' and '.join(ways)}" if ways else "not at all"
        return (
            f"parameters on the host are shards that are gathered to compute, and {plan.strategy} "
            f"places units over the data axis {given}",
            f"{remedy} place every unit as shard (fsdp, hsdp, fsdp-tp)",
        )
    if plan.placed("sequence"):
        return (
            "parameters on the host do not run with activations split by tokens: their gradients "
            "are added up over the tensor axis on the device",
            f"{remedy} place nothing as sequence",
        )
    wide = any(len(stage.devices) > 1 or stage.no_grad for stage in plan.stages)
    if plan.splits or wide or len(plan.stages) > 1 or plan.size("pipeline") > 1:
        what = "splits of operators" if plan.splits else "stages of a pipeline"
        return (
            f"parameters on the host run under FSDP2 alone, not with {what}",
            f"{remedy} use fsdp, hsdp or fsdp-tp",
        )
    return None


def _mesh(plan: Plan, where: str) -> None:
    names = Counter(axis.name for axis in plan.mesh)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise FormatError(f"{where}: the mesh has two axes called {twice[0]}")
    for axis in plan.mesh:
        if axis.size < 1:
            raise FormatError(f"{where}: axis {axis.name} has size {axis.size}; at least 1")
    used = {entry.axis for entry in plan.placements}
    used |= {split.axis for split in plan.splits if split.axis is not None}
    absent = sorted(used - set(names))
    if absent:
        raise FormatError(f"{where}: something is split over {absent[0]}, which the mesh has not")
    co_shards = [split for split in plan.splits if split.axis is None]
    for split in co_shards:
        if split.parts < 2:
            raise FormatError(
                f"{where}: co-shard of {split.ops} has {split.parts} parts; 2 or more"
            )


def _stages(plan: Plan, where: str) -> None:
    size = plan.size("pipeline")
    if len(plan.order) != size:
        raise FormatError(
            f"{where}: {size} positions along the pipeline and {len(plan.order)} rows of order"
        )
    for index, stage in enumerate(plan.stages):
        outside = [device for device in stage.devices if not 0 <= device < size]
        if outside or not stage.devices:
            raise FormatError(
                f"{where}: stage {index} is on positions {list(stage.devices)} of a pipeline of "
                f"{size}"
            )


def _complete(plan: Plan, where: str) -> None:
    """Every stage has F of every microbatch, and B or both I and W; nothing else is there."""
    present = {action for row in plan.order for action in row}
    wanted: set[Action] = set()
    for index, stage in enumerate(plan.stages):
        for microbatch in range(plan.microbatches):
            wanted.add(Action(index, "F", microbatch))
            halves = {Action(index, kind, microbatch) for kind in ("I", "W")}
            if not stage.no_grad:
                whole = Action(index, "B", microbatch)
                wanted |= halves if halves & present and whole not in present else {whole}
    missing, foreign = sorted(wanted - present), sorted(present - wanted)
    if missing or foreign:
        raise FormatError(
            f"{where}: the order is not {', '.join(KINDS)} of {plan.microbatches} microbatches of "
            f"{len(plan.stages)} stages (missing: {_names(missing)}; foreign: {_names(foreign)})"
        )


def _names(actions: list[Action]) -> str:
    more = f" and {len(actions) - _SHOWN} more" if len(actions) > _SHOWN else ""
    return (", ".join(map(str, actions[:_SHOWN])) or "none") + more
