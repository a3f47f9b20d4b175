"""Problems, schedules and the clock: what is refused, what is measured, the same as one by one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import FormatError, UsageError
from toolkit.plan.order import Action, Block, Edge, Problem, Schedule, Stage, chain, greedy, show
from toolkit.plan.order.clock import Clock, run
from toolkit.plan.order.families import FAMILIES, build
from toolkit.plan.order.simple import one_f_one_b

A, B = Action(0, "F", 0), Action(1, "F", 0)


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ([Block(A, (0,), 1), Block(A, (1,), 1)], "0F0 is there twice"),
        ([Block(A, (), 1)], "0F0 names devices"),
        ([Block(A, (0, 0), 1)], "0F0 names devices"),
        ([Block(A, (0, 2), 1)], "0F0 is on devices .*0 to 1"),
        ([Block(A, (0,), 0)], "0F0 has span 0"),
        ([Block(A, (0,), math.nan)], "0F0 has span nan"),
        ([Block(A, (0,), 1, 9)], "0F0 alone adds 9 of memory; the limit is 4"),
        ([Block(A, (0,), 1, after=(Edge(B),))], "0F0 waits for 1F0, which is no block"),
        ([Block(A, (0,), 1), Block(B, (0,), 1, after=(Edge(A, -1),))], "0F0 reaches 1F0 after -1"),
        (
            [Block(A, (0,), 1, after=(Edge(B),)), Block(B, (0,), 1, after=(Edge(A),))],
            "wait for one another: (0F0 -> 1F0 -> 0F0|1F0 -> 0F0 -> 1F0)",
        ),
    ],
)
def test_problems_that_make_no_sense_name_the_block(blocks, said):
    with pytest.raises(UsageError, match=said):
        Problem(tuple(blocks), 2, 4)


def test_costs_for_another_number_of_stages_are_refused():
    with pytest.raises(UsageError, match="4 stages; costs for 3"):
        run(one_f_one_b(4, 4), [Stage()] * 3)
    with pytest.raises(UsageError, match="3 boundaries between stages; 1 delays"):
        run(one_f_one_b(4, 4), delay=[1.0])


@pytest.mark.parametrize(
    ("starts", "said"),
    [
        ((0, 0.5, 3, 4), "1F0 starts at 0.5; 0F0, which it needs, is there at 1"),
        ((0, 1, 2.5, 5), "1F0 and 1B0 are on device 1 at once"),
        ((-1, 1, 3, 5), "0F0 starts at -1"),
        ((0, math.nan, 3, 5), "1F0 starts at nan"),
        ((0, 1, 3), "3 starts for 4 blocks"),
    ],
)
def test_schedules_that_break_a_rule_name_the_blocks(starts, said):
    problem = chain([(0,), (1,)], [Stage(1, 1, 1), Stage(2, 1, 1)])
    with pytest.raises(FormatError, match=said):
        Schedule(problem, tuple(map(float, starts))).check()


def test_memory_above_the_limit_names_device_and_block():
    order = one_f_one_b(3, 4)
    free = run(order)
    held = Schedule(order.problem(memory_limit=2), free.starts)
    with pytest.raises(FormatError, match="device 0 holds 3 of 2 from 2 on, with 0F2"):
        held.check()


def test_memory_of_a_split_backward():
    """I frees all but what W needs; what ends at a time is freed before what starts then."""
    schedule = run(build("zb-h1", 1, 1), Stage(1, 1, 1, memory=3, kept=1))
    assert schedule.memory(0) == ((0, 3), (2, 1), (3, 0))


def test_what_a_schedule_measures():
    schedule = run(one_f_one_b(2, 2), Stage(1, 1, 1))
    assert schedule.makespan == 9
    assert [schedule.idle(d) for d in (0, 1)] == [3, 3]
    assert [schedule.stall(d) for d in (0, 1)] == [3, 0]
    assert schedule.peak == 2
    assert schedule.start(Action(1, "B", 0)) == 2
    timeline = schedule.timeline("step", unit_s=0.5)
    assert timeline.duration_s == 4.5
    assert {span.source for span in timeline.spans} == {"simulated"}
    assert [track for track, _ in timeline.tracks] == ["device 0", "device 1"]


def by_hand(problem, rows):
    """Run the rows one action at a time."""
    ends, free_at, at = {}, [0.0] * problem.num_devices, [0] * problem.num_devices
    while len(ends) < len(problem.blocks):
        for device, row in enumerate(rows):
            if at[device] == len(row):
                continue
            block = problem.blocks[problem.index[row[at[device]]]]
            here = all(
                at[d] < len(rows[d]) and rows[d][at[d]] == block.action for d in block.devices
            )
            if here and all(edge.source in ends for edge in block.after):
                ready = [ends[edge.source] + edge.delay for edge in block.after]
                end = max([*ready, *(free_at[d] for d in block.devices)]) + block.span
                ends[block.action] = end
                for d in block.devices:
                    free_at[d] = end
                    at[d] += 1
    return [ends[block.action] for block in problem.blocks]


@given(st.sampled_from(sorted(FAMILIES)), st.integers(1, 4), st.data())
@settings(max_examples=60, deadline=None)
def test_the_clock_agrees_with_running_rows_one_action_at_a_time(name, p, data):
    order = build(name, p, 2 * p)
    span = st.integers(1, 9)
    stages = [Stage(data.draw(span), data.draw(span), data.draw(span)) for _ in order.placement]
    delays = [data.draw(st.integers(0, 3)) for _ in order.placement[1:]]
    problem = order.problem(stages, delay=delays)
    expected = by_hand(problem, order.rows)
    assert Clock(problem, order.rows).ends().tolist() == expected
    # The same from a clock made for other costs, alone and as one of two trials.
    clock = Clock(order.problem(), order.rows)
    spans = clock.spans(stages)
    assert clock.ends(spans, delays=delays).tolist() == expected
    both = clock.ends(np.stack([spans, 2 * spans], axis=1), delays=delays)
    assert both[:, 0].tolist() == expected
    assert clock.makespan(2 * spans) == 2 * clock.makespan(spans)


def test_sixty_four_stages_and_512_microbatches():
    """Built, checked and timed in about a second: the size of a large search."""
    order = one_f_one_b(64, 512)
    clock = Clock(order.problem(), order.rows)
    assert clock.makespan() == (512 + 63) * 3
    slower = clock.spans([Stage(1, 1, 1)] * 63 + [Stage(1, 1, 1.5)])
    assert clock.makespan(slower) == 63 * 3 + 512 * 3.5


def test_reversing_twice_is_the_problem_itself():
    problem = chain([(0,), (1,)], Stage(), delay=2, split=True)
    back = problem.reversed().reversed()
    assert back.index == problem.index
    assert [set(block.after) for block in back.blocks] == [set(b.after) for b in problem.blocks]
    assert [block.memory for block in back.blocks] == [b.memory for b in problem.blocks]
    assert problem.reversed().heads[0] == problem.tails[-1]


def test_only_one_microbatch_is_repeated():
    two = chain([(0,)], Stage()).repeat(2)
    with pytest.raises(UsageError, match=r"only one microbatch .* \[0, 1\]"):
        two.repeat(2)


def test_text_of_a_schedule_with_shared_blocks_and_chunks():
    order = build("interlaced", 2, 2)
    drawn = show.text(run(order), "interlaced")
    assert "shared forward" in drawn
    assert "chunk" not in drawn
    chunked = show.text(run(build("zb-v", 2, 3)), "ZB-V")
    assert "forward, chunk 1" in chunked
    assert "weight gradient, chunk 0" in chunked


def test_greedy_respects_delays_and_shared_devices():
    one = chain([(0, 1), (0,), (1,), (0, 1)], Stage(), delay=0.5)
    for rule in greedy.RULES:
        schedule = greedy.schedule(replace(one, memory_limit=12).repeat(3), rule)
        schedule.check()
