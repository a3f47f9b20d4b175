"""Search: the published interlaced schedule matched, small problems solved as by brute force."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from toolkit.errors import InfeasibleError, UsageError
from toolkit.plan.order import (
    Action,
    Block,
    Edge,
    Problem,
    Schedule,
    Stage,
    bounds,
    chain,
    frontier,
    greedy,
    repetend,
)
from toolkit.plan.order.clock import Clock, run
from toolkit.plan.order.search import justified, one_by_one, search
from toolkit.plan.order.shared import interlaced, interlaced_costs, published_interlaced
from toolkit.plan.order.simple import one_f_one_b
from toolkit.plan.order.zero_bubble import zb_h1

# osdi24ae: cupilot/mllm.4stages.sched.json: the steps at which microbatches 0 to 5 start.
PUBLISHED = {
    (0, "F"): (0, 1, 4, 8, 9, 28),
    (1, "F"): (2, 3, 5, 11, 13, 30),
    (2, "F"): (3, 5, 6, 13, 15, 33),
    (3, "F"): (5, 6, 7, 15, 30, 37),
    (4, "F"): (6, 7, 11, 23, 33, 40),
    (5, "F"): (10, 16, 17, 27, 35, 42),
    (5, "B"): (12, 18, 22, 29, 36, 43),
    (4, "B"): (13, 19, 24, 30, 37, 44),
    (3, "B"): (19, 23, 31, 38, 44, 47),
    (2, "B"): (24, 30, 37, 44, 47, 50),
    (1, "B"): (31, 38, 44, 47, 50, 53),
    (0, "B"): (34, 41, 56, 57, 58, 59),
}


def published() -> Schedule:
    problem = published_interlaced().repeat(6)
    return Schedule(
        problem,
        tuple(float(PUBLISHED[block.slot][block.action.microbatch]) for block in problem.blocks),
    )


def test_the_published_schedule_reads_as_published():
    schedule = published()
    schedule.check()
    assert schedule.makespan == 60
    assert [schedule.problem.busy(d) for d in range(4)] == [48] * 4
    assert schedule.bubble == pytest.approx(0.2)
    assert [schedule.peak_memory(d) for d in range(4)] == [6, 5, 4, 3]
    assert repetend.steady(schedule).period == 8


def test_search_matches_the_published_schedule_and_proves_it_optimal():
    found = search(published_interlaced(), 6, time_limit_s=200)
    found.schedule.check()
    assert found.schedule.makespan == 60 == found.bound.value
    assert (
        "device 3 has work for 48, and waits 3 at its head and 9 at its tail" in found.bound.reason
    )
    assert found.proved
    assert found.gap == 0
    assert found.schedule.peak <= 6
    # Not only short: it repeats, without idle time, every 8.
    assert repetend.steady(found.schedule).period == 8
    assert found.repetend.period == 8 == found.repetend.at_least


def test_its_steady_state_stays_optimal_for_more_microbatches():
    steady = repetend.search(published_interlaced(), time_limit_s=120)
    for m in (8, 24):
        periodic = steady.repeat(m)
        schedule = Clock(periodic.problem, periodic.rows).schedule()
        schedule.check()
        assert schedule.makespan == 8 * m + 12 == bounds.makespan(periodic.problem).value


def test_five_microbatches_of_memory_are_enough_for_60():
    """The published schedule holds 6; with 5 the makespan is the same, though not the period."""
    problem = replace(published_interlaced(), memory_limit=5).repeat(6)
    found = frontier.search(problem, time_limit_s=60)
    found.schedule.check()
    assert found.proved
    assert found.schedule.makespan == 60
    assert found.schedule.peak == 5


@pytest.mark.slow
def test_five_microbatches_of_memory_cannot_repeat_faster_than_9():
    one = replace(published_interlaced(), memory_limit=5)
    found = repetend.search(one, time_limit_s=200)
    assert found.period == pytest.approx(9)
    assert found.proved


def test_two_microbatches_together_may_repeat_faster_than_one():
    stages = [Stage(3, 4, 0), Stage(3, 2, 0), Stage(2, 3, 0)]
    one = chain([(0,), (1,), (2,)], stages, memory_limit=2)
    alone, pair = (
        repetend.search(one, time_limit_s=120),
        repetend.search(one, together=2, time_limit_s=60),
    )
    assert alone.proved
    assert alone.period == pytest.approx(10)
    assert pair.proved
    assert pair.period == pytest.approx(9.5)
    for m in (1, 4, 7):
        schedule = pair.repeat(m)
        schedule.check()
        assert len(schedule.starts) == 6 * m


def test_the_handmade_interlaced_pipeline_is_beaten():
    costs = interlaced_costs(4, Stage(1, 1, 0, 0), Stage(1, 1, 2, 1))
    by_hand = run(interlaced(4, 6), costs)
    assert by_hand.makespan == 70
    assert repetend.steady(by_hand).period == 10


def test_search_is_deterministic():
    one = chain([(0,), (1,), (2,)], [Stage(1, 2, 1), Stage(2, 1, 1), Stage(1, 1, 3)], split=True)
    results = [search(replace(one, memory_limit=3), 4, time_limit_s=30) for _ in range(2)]
    assert results[0].schedule == results[1].schedule
    assert results[0].method == results[1].method


def test_unequal_stages_and_delays():
    stages = [Stage(1, 1.5, 1), Stage(2.25, 2, 0.5), Stage(1, 1, 1), Stage(0.5, 1.5, 2)]
    one = chain([(d,) for d in range(4)], stages, split=True, delay=[0.3, 0, 0.7], memory_limit=4)
    found = search(one, 8, time_limit_s=5)
    found.schedule.check()
    for by_hand in (one_f_one_b(4, 8), zb_h1(4, 8)):
        assert found.schedule.makespan < run(by_hand, stages, delay=[0.3, 0, 0.7]).makespan
    assert found.gap <= 0.1
    assert found.repetend.period == pytest.approx(4.75)


def test_zero_time_still_gives_a_schedule_and_improvements_are_heard():
    heard = []
    found = search(
        published_interlaced(),
        6,
        time_limit_s=0,
        heard=lambda how, s: heard.append((how, s.makespan)),
    )
    found.schedule.check()
    assert heard[-1] == (found.method, found.schedule.makespan)
    assert [length for _, length in heard] == sorted((length for _, length in heard), reverse=True)


def test_memory_too_small_is_infeasible_and_one_after_another_is_the_last_resort():
    two_chunks = chain([(0,), (1,), (0,), (1,)], Stage())
    with pytest.raises(InfeasibleError, match=r"memory of 1\.5"):
        search(replace(two_chunks, memory_limit=1.5), 3)
    found = search(replace(two_chunks, memory_limit=2), 3)
    assert found.schedule.peak <= 2
    with pytest.raises(InfeasibleError, match="holds 2 on a device"):
        one_by_one(replace(two_chunks, memory_limit=1.5).repeat(2))
    with pytest.raises(UsageError, match="0 microbatches"):
        search(two_chunks, 0)


def test_a_greedy_rule_that_wedges_says_so():
    # Devices 0 and 1 both fill with first chunks, which only their second chunks free.
    problem = replace(chain([(0,), (1,), (0,), (1,)], Stage()), memory_limit=2).repeat(4)
    with pytest.raises(InfeasibleError, match="wait for memory"):
        greedy.schedule(problem, "forward first")
    with pytest.raises(UsageError, match="unknown priority rule"):
        greedy.schedule(problem, "forwards first")


@st.composite
def problems(draw, most=6):
    """A few blocks on up to three devices, some shared, with memory taken and given back."""
    num_devices = draw(st.integers(1, 3))
    blocks = []
    for at in range(draw(st.integers(1, most))):
        devices = draw(st.sets(st.integers(0, num_devices - 1), min_size=1))
        after = draw(st.sets(st.integers(0, at - 1), max_size=2)) if at else ()
        edges = (Edge(Action(i, "F", 0), draw(st.integers(0, 2))) for i in sorted(after))
        blocks.append(
            Block(
                Action(at, "F", 0),
                tuple(sorted(devices)),
                draw(st.integers(1, 4)),
                draw(st.integers(-1, 1)),
                tuple(edges),
            )
        )
    return Problem(tuple(blocks), num_devices, draw(st.sampled_from([1, 2, math.inf])))


def brute_force(problem):
    """The least makespan over all orders of all blocks, each started as early as it can."""
    best = math.inf
    for order in itertools.permutations(range(len(problem.blocks))):
        ends, free_at = {}, [0] * problem.num_devices
        held = [0] * problem.num_devices
        for i in order:
            block = problem.blocks[i]
            if any(source not in ends for source, _ in problem.sources[i]):
                break
            if any(held[d] + block.memory > problem.memory_limit for d in block.devices):
                break
            ready = [ends[source] + delay for source, delay in problem.sources[i]]
            ends[i] = max([*ready, *(free_at[d] for d in block.devices)]) + block.span
            for device in block.devices:
                free_at[device] = ends[i]
                held[device] += block.memory
        else:
            best = min(best, max(ends.values()))
    return best


@given(problems())
@settings(max_examples=150, deadline=None)
def test_exact_search_equals_brute_force(problem):
    least = brute_force(problem)
    assert bounds.makespan(problem).value <= least
    found = frontier.search(problem, time_limit_s=60)
    assert found.proved
    if math.isinf(least):
        assert found.schedule is None
    else:
        found.schedule.check()
        assert found.schedule.makespan == least


@given(st.integers(1, 3), st.integers(2, 3), st.lists(st.integers(1, 3), min_size=9, max_size=9))
@settings(max_examples=20, deadline=None)
def test_exact_search_by_counts_equals_exact_search_block_by_block(p, m, spans):
    """Alike microbatches are counted; told apart by a hair of memory they are not."""
    stages = [Stage(*spans[3 * d : 3 * d + 3]) for d in range(p)]
    alike = chain([(d,) for d in range(p)], stages, memory_limit=2).repeat(m)
    first = replace(alike.blocks[0], memory=alike.blocks[0].memory + 1e-12)
    apart = replace(alike, blocks=(first, *alike.blocks[1:]))
    assert len(frontier._groups(alike)) < len(frontier._groups(apart))
    counted, single = (frontier.search(each, time_limit_s=60) for each in (alike, apart))
    assert counted.proved
    assert single.proved
    assert counted.schedule.makespan == single.schedule.makespan


@given(problems(most=7))
@settings(max_examples=100, deadline=None)
def test_list_schedules_keep_all_rules_and_justifying_never_breaks_them(problem):
    found = []
    for rule in greedy.RULES:
        try:
            found.append(greedy.schedule(problem, rule))
        except InfeasibleError:
            continue
    for schedule in found:
        schedule.check()
        assert schedule.makespan >= bounds.makespan(schedule.problem).value
        if math.isinf(problem.memory_limit):
            assert justified(schedule).makespan <= schedule.makespan
    assume(found)


def least_integer_period(one):
    """The least whole period by trying all offsets: with whole spans, whole offsets are enough."""
    period = max(1, math.ceil(bounds.period(one).value))
    while not any(
        periodic(one, (0, *offsets), period)
        for offsets in itertools.product(range(3 * period), repeat=len(one.blocks) - 1)
    ):
        period += 1
    return period


def periodic(one, offsets, period):
    for j, sources in enumerate(one.sources):
        if any(offsets[j] < offsets[i] + one.blocks[i].span + delay for i, delay in sources):
            return False
    for device in range(one.num_devices):
        taken = [
            (offsets[i] + step) % period
            for i in one.on_device[device]
            for step in range(one.blocks[i].span)
        ]
        if len(taken) != len(set(taken)):
            return False
    steady = repetend.Repetend(one, period, tuple(map(float, offsets)), 0).repeat(8)
    return steady.peak <= one.memory_limit


@given(
    st.lists(st.tuples(st.integers(1, 2), st.integers(1, 3)), min_size=1, max_size=2),
    st.booleans(),
    st.sampled_from([1, 2, math.inf]),
)
@settings(max_examples=25, deadline=None)
def test_least_period_equals_brute_force(times, folded, limit):
    stages = [Stage(forward, backward, 0) for forward, backward in times]
    placement = [(0,) if folded else (d,) for d in range(len(stages))]
    one = chain(placement, stages, memory_limit=limit)
    if limit < len(stages) and folded and len(stages) > 1:
        with pytest.raises(InfeasibleError, match="no steady state"):
            repetend.search(one)
        return
    found = repetend.search(one)
    assert found.proved
    periodic_schedule = found.repeat(7)
    periodic_schedule.check()
    assert math.ceil(found.period - 1e-9) == least_integer_period(one)


def test_a_period_between_whole_numbers():
    one = chain([(0,), (1,)], [Stage(1, 1.5, 0), Stage(1.25, 1.1, 0)], memory_limit=1)
    found = repetend.search(one)
    # With one microbatch at a time on device 0, the next starts when this one is back.
    assert found.period == pytest.approx(1 + 1.25 + 1.1 + 1.5)
    assert bounds.period(one).value == pytest.approx(found.period)


def test_the_solver_prints_nothing_where_json_may_go(capfd):
    repetend.search(replace(published_interlaced(), memory_limit=4), time_limit_s=3)
    assert capfd.readouterr().out == ""


def test_steady_states_of_known_tables():
    assert repetend.steady(run(one_f_one_b(3, 9), Stage(1, 1, 1))).period == 3
    # Alone, a microbatch is its own stretch: followed by itself it takes what device 0 is held.
    assert repetend.steady(run(one_f_one_b(2, 1), Stage(1, 1, 1))).period == 6
