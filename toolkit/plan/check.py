"""Whether a plan can be run at all: its mesh, its stages, and its table of actions."""

from __future__ import annotations

from collections import Counter

from toolkit.errors import FormatError, UsageError
from toolkit.plan.order import deadlock
from toolkit.plan.order.action import KINDS, Action
from toolkit.plan.plan import Plan

_SHOWN = 3


def check(plan: Plan, *, where: str = "plan") -> None:
    """Raise FormatError unless every stage runs every microbatch once where it belongs, all devices
    run what they share in one order, and none waits for ever.
    """
    _mesh(plan, where)
    _stages(plan, where)
    _complete(plan, where)
    try:
        problem = plan.table.problem()
    except UsageError as error:
        raise FormatError(f"{where}: order: {error}") from error
    faults = deadlock.find(problem, plan.order)
    if faults:
        shown = "; ".join(map(str, faults[:_SHOWN]))
        raise FormatError(f"{where}: the order cannot run: {shown}")


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
