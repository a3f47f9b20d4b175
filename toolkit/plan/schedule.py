"""Order tables: which action each stage runs next, and the check that a table can run at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from toolkit.errors import FormatError
from toolkit.plan.plan import Action, Plan

Table = tuple[tuple[Action, ...], ...]


def accumulate(num_microbatches: int) -> Table:
    """One stage: forward and backward of each microbatch in turn (gradient accumulation).

    >>> [str(action) for action in accumulate(2)[0]]
    ['0F0', '0B0', '0F1', '0B1']
    """
    row = [Action(0, kind, i) for i in range(num_microbatches) for kind in ("F", "B")]
    return (tuple(row),)


def one_f_one_b(num_stages: int, num_microbatches: int) -> Table:
    """1F1B: stage s runs p - s forwards, then one backward and one forward in turn, then drains.

    The order of PipeDream-Flush (Narayanan et al. 2021, figure 4): at most p - s microbatches of
    stage s are alive at once, whatever their number.

    >>> [" ".join(map(str, row)) for row in one_f_one_b(2, 3)]
    ['0F0 0F1 0B0 0F2 0B1 0B2', '1F0 1B0 1F1 1B1 1F2 1B2']
    """
    rows = []
    for stage in range(num_stages):
        warm_up = min(num_microbatches, num_stages - stage)
        row = [Action(stage, "F", i) for i in range(warm_up)]
        for i in range(num_microbatches):
            row.append(Action(stage, "B", i))
            if warm_up + i < num_microbatches:
                row.append(Action(stage, "F", warm_up + i))
        rows.append(tuple(row))
    return tuple(rows)


def needs(action: Action, num_stages: int) -> Iterator[Action]:
    """Yield the actions whose results `action` consumes.

    >>> [str(needed) for needed in needs(Action(0, "B", 1), 2)]
    ['0F1', '1B1']
    """
    stage, microbatch = action.stage, action.microbatch
    if action.kind == "F":
        if stage > 0:
            yield Action(stage - 1, "F", microbatch)
    else:
        yield Action(stage, "F", microbatch)
        if stage + 1 < num_stages:
            yield Action(stage + 1, "B", microbatch)


def run_order(table: Sequence[Sequence[Action]]) -> tuple[list[Action], list[Action]]:
    """Run the table as the ranks would; return (actions in a feasible order, actions stuck)."""
    done: dict[Action, None] = {}
    waiting = [list(reversed(row)) for row in table]
    progress = True
    while progress:
        progress = False
        for row in waiting:
            while row and all(needed in done for needed in needs(row[-1], len(table))):
                done[row.pop()] = None
                progress = True
    return list(done), [action for row in waiting for action in reversed(row)]


def alive(row: Sequence[Action]) -> int:
    """Return the most microbatches whose activations a stage holds at once.

    >>> [alive(row) for row in one_f_one_b(4, 8)]
    [4, 3, 2, 1]
    """
    held = peak = 0
    for action in row:
        held += 1 if action.kind == "F" else -1
        peak = max(peak, held)
    return peak


def bubble(num_stages: int, num_microbatches: int) -> float:
    """The idle share of 1F1B with equal stages and free communication: (p - 1) / (m + p - 1).

    >>> bubble(4, 8) == 3 / 11
    True
    """
    return (num_stages - 1) / (num_microbatches + num_stages - 1)


def check(plan: Plan, *, where: str = "plan") -> None:
    """Raise FormatError unless every stage runs F and B of every microbatch once and none waits
    for ever.
    """
    if len(plan.order) != len(plan.stages):
        raise FormatError(f"{where}: {len(plan.stages)} stages and {len(plan.order)} rows of order")
    for stage, row in enumerate(plan.order):
        wanted = {Action(stage, kind, i) for i in range(plan.microbatches) for kind in ("F", "B")}
        extra = [str(action) for action in row if action not in wanted]
        missing = sorted(str(action) for action in wanted.difference(row))
        if extra or missing or len(row) != len(wanted):
            raise FormatError(
                f"{where}: the order of stage {stage} is not F and B of {plan.microbatches} "
                f"microbatches once each (missing: {', '.join(missing) or 'none'}; "
                f"foreign: {', '.join(extra) or 'none'}; {len(row)} actions for {len(wanted)})"
            )
    _, stuck = run_order(plan.order)
    if stuck:
        first = stuck[0]
        waits = ", ".join(str(needed) for needed in needs(first, len(plan.stages)))
        raise FormatError(
            f"{where}: the order deadlocks: {first} waits for {waits}, and {len(stuck)} actions "
            "never run"
        )
