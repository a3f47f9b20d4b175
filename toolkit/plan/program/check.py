"""What a program has to satisfy before it can run; each fault is refused, its operators named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import networkx as nx

from toolkit.errors import InfeasibleError, UsageError
from toolkit.plan.program import depend
from toolkit.plan.program.depend import View
from toolkit.plan.tensors import Box, Mask, VTensor

if TYPE_CHECKING:
    from toolkit.plan.program.frozen import FrozenProgram

_SHOWN = 4


def check(program: FrozenProgram) -> None:
    """Raise UsageError unless every view is made by someone, and InfeasibleError for a cycle."""
    _names(program)
    _coverage(program)
    _cycles(program)
    _recomputed(program)


def _names(program: FrozenProgram) -> None:
    twice = [name for name, n in Counter(s.name for s in program.sub_ops).items() if n > 1]
    if twice:
        raise UsageError(f"{program.name} has two sub-operators called {twice[0]}")
    placed: dict[tuple[str, int], str] = {}
    for sub_op in program.sub_ops:
        other = placed.setdefault((sub_op.work, sub_op.device), sub_op.name)
        if other != sub_op.name:
            raise UsageError(
                f"{other} and {sub_op.name} do the same on device {sub_op.device}",
                remedy="assign replicas to different devices",
            )
    for first, second in program.order:
        for name in (first, second):
            if name not in program.sub_op:
                raise UsageError(f"{name} is ordered and not part of {program.name}")


def _coverage(program: FrozenProgram) -> None:
    """Every consumer's view, and every output of the whole, is made by someone."""
    makers = depend.producers(program.sub_ops)
    for sub_op in program.sub_ops:
        for view in sub_op.inputs:
            name = view.tensor.name
            if name in program.sources:
                continue
            made = [one.mask for one in makers.get(name, {}).values()]
            _whole(depend.gaps(view, made), f"{sub_op.name} reads {name}", makers.get(name, {}))
    for name in program.outputs:
        if name in program.sources:
            continue
        views = makers.get(name, {})
        if not views:
            raise UsageError(f"{name} is an output of {program.name} and nothing makes it")
        first = next(iter(views.values()))
        every = VTensor(first.tensor, Mask.whole(first.tensor.shape), first.rank)
        gaps = depend.gaps(every, [one.mask for one in views.values()])
        _whole(gaps, f"{name} is an output of {program.name}", views)


def _whole(gaps: tuple[Box, ...], what: str, views: Mapping[View, VTensor]) -> None:
    if gaps:
        box = Mask(gaps[0])
        near = [str(view) for view in views.values() if view.mask & box][:_SHOWN]
        known = f"there is only {', '.join(near)}" if near else "nothing makes that"
        raise UsageError(
            f"{what}, and its part {box} is missing: {known}",
            remedy="let the parts of what makes it cover it, and its partial sums add up",
        )


def _cycles(program: FrozenProgram) -> None:
    try:
        found = nx.find_cycle(program.dependencies)
    except nx.NetworkXNoCycle:
        return
    steps = []
    for first, second in found:
        why = program.dependencies.edges[first, second]["why"]
        steps.append(f"{first} -> {second} ({'ordered' if why == ('order',) else why[0]})")
    raise InfeasibleError(
        f"{program.name} can never run, each waits for the one before: {'; '.join(steps)}",
        remedy="take back one of the orders",
    )


def _recomputed(program: FrozenProgram) -> None:
    """What is computed again together has to be in one place."""
    devices: dict[str, dict[int, str]] = {}
    for sub_op in program.sub_ops:
        if sub_op.recompute:
            family = sub_op.recompute.rpartition(" ")[0]
            devices.setdefault(family, {}).setdefault(sub_op.device, sub_op.name)
    for family, held in devices.items():
        if len(held) > 1:
            raise UsageError(
                f"{family} is on devices {sorted(held)}: {', '.join(held.values())}",
                remedy="assign all parts of a co-shard to one device",
            )
