"""Tables broken at random: what cannot run is caught, what is caught cannot run."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import FormatError
from toolkit.plan.order import Action, Block, Edge, Problem, deadlock
from toolkit.plan.order.clock import Clock
from toolkit.plan.order.families import FAMILIES, build
from toolkit.plan.order.simple import one_f_one_b

SMALL = [(name, p, 2 * p) for name in sorted(FAMILIES) for p in (2, 3)]


def execute(problem, rows):
    """Run the rows as ranks would; say whether every block ran once and every row came to its end.

    A rank stands at its next action. It goes on when all that the action needs is done and, for a
    shared block, when all its devices stand at it.
    """
    blocks = {block.action: block for block in problem.blocks}
    at = [0] * len(rows)
    done = set()
    moved = True
    while moved:
        moved = False
        for device, row in enumerate(rows):
            if at[device] == len(row):
                continue
            action = row[at[device]]
            if action not in blocks or device not in blocks[action].devices or action in done:
                return False
            block = blocks[action]
            together = all(
                other < len(rows)
                and at[other] < len(rows[other])
                and rows[other][at[other]] == action
                for other in block.devices
            )
            if together and all(edge.source in done for edge in block.after):
                done.add(action)
                for other in block.devices:
                    at[other] += 1
                moved = True
    return done == set(blocks) and all(a == len(row) for a, row in zip(at, rows, strict=True))


@st.composite
def mutated(draw):
    """A valid table after one to three of: swap, move, drop, duplicate, retarget."""
    name, p, m = draw(st.sampled_from(SMALL))
    order = build(name, p, m)
    rows = [list(row) for row in order.rows]
    for _ in range(draw(st.integers(1, 3))):
        row = rows[draw(st.integers(0, p - 1))]
        if not row:
            continue
        at = draw(st.integers(0, len(row) - 1))
        match draw(
            st.sampled_from(["swap", "neighbours", "move", "drop", "duplicate", "retarget"])
        ):
            case "swap":
                other = draw(st.integers(0, len(row) - 1))
                row[at], row[other] = row[other], row[at]
            case "neighbours":
                other = min(at + 1, len(row) - 1)
                row[at], row[other] = row[other], row[at]
            case "move":
                row.insert(draw(st.integers(0, len(row) - 1)), row.pop(at))
            case "drop":
                row.pop(at)
            case "duplicate":
                row.insert(draw(st.integers(0, len(row))), row[at])
            case "retarget":
                target = rows[draw(st.integers(0, p - 1))]
                target.insert(draw(st.integers(0, len(target))), row.pop(at))
    return order.problem(), tuple(map(tuple, rows))


@given(mutated())
@settings(max_examples=400, deadline=None)
def test_a_fault_is_found_exactly_when_the_table_cannot_run(case):
    problem, rows = case
    faults = deadlock.find(problem, rows)
    assert (faults == []) == execute(problem, rows)
    for fault in faults:
        assert fault.blocks
        assert str(fault.blocks[0]) in str(fault)
        check_circle(problem, rows, fault)


def check_circle(problem, rows, fault):
    """Each block of a circle waits for the next: it needs it or comes right after it in a row."""
    if fault.what != "circle":
        return
    assert fault.blocks[0] == fault.blocks[-1]
    for waits, first in zip(fault.blocks, fault.blocks[1:], strict=False):
        needs = {edge.source for edge in problem.blocks[problem.index[waits]].after}
        behind = {row[row.index(waits) - 1] for row in rows if waits in row and row[0] != waits}
        assert first in needs | behind


@pytest.mark.parametrize(("name", "p", "m"), SMALL)
def test_whole_tables_run(name, p, m):
    order = build(name, p, m)
    assert execute(order.problem(), order.rows)
    assert deadlock.find(order.problem(), order.rows) == []


def broken(change):
    order = one_f_one_b(2, 2)
    rows = [list(row) for row in order.rows]
    change(rows)
    return order.problem(), rows


@pytest.mark.parametrize(
    ("change", "what", "said"),
    [
        (lambda rows: rows[0].remove(Action(0, "B", 1)), "missing", "0B1 missing from .* device 0"),
        (lambda rows: rows[1].append(Action(1, "F", 0)), "repeated", "1F0 more than once"),
        (lambda rows: rows[1].append(Action(0, "F", 0)), "misplaced", "0F0 .* does not belong"),
        (lambda rows: rows[0].append(Action(7, "F", 0)), "foreign", "7F0 .*no such block"),
        (lambda rows: rows.pop(), "missing", "1B0, 1B1, 1F0, 1F1 missing"),
        (lambda rows: rows.append([Action(0, "F", 0)]), "misplaced", "device 2"),
        (lambda rows: rows[0].insert(0, rows[0].pop(2)), "circle", "0B0 waits for|waits for 0B0"),
    ],
)
def test_messages_name_blocks_and_devices(change, what, said):
    problem, rows = broken(change)
    (fault,) = deadlock.find(problem, rows)
    assert fault.what == what
    with pytest.raises(FormatError, match=said):
        Clock(problem, tuple(map(tuple, rows)))


def test_shared_blocks_in_different_orders_are_named():
    one, two = Action(0, "F", 0), Action(0, "F", 1)
    problem = Problem((Block(one, (0, 1), 1), Block(two, (0, 1), 1)), 2)
    faults = deadlock.find(problem, ((one, two), (two, one)))
    assert [fault.what for fault in faults] == ["collective order", "circle"]
    assert faults[0].blocks == (one, two)
    assert faults[0].devices == (0, 1)


def test_messages_that_overtake_are_named():
    sends = [Action(0, "F", 0), Action(0, "F", 1)]
    uses = [Action(1, "F", 0), Action(1, "F", 1)]
    blocks = [Block(action, (0,), 1) for action in sends]
    blocks += [
        Block(use, (1,), 1, after=(Edge(send),)) for use, send in zip(uses, sends, strict=True)
    ]
    problem = Problem(tuple(blocks), 2)
    assert deadlock.overtaking(problem, (tuple(sends), tuple(uses))) == []
    (found,) = deadlock.overtaking(problem, (tuple(sends), tuple(reversed(uses))))
    assert found.blocks == tuple(sends)
    assert found.devices == (0, 1)
