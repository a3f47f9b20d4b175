from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import FormatError
from toolkit.plan import chain, check, planner, simulate
from toolkit.plan.order.action import Action
from toolkit.plan.order.simple import one_f_one_b

STAGES, MICROBATCHES = st.integers(1, 8), st.integers(1, 24)


def equal_stages(p: int, m: int) -> simulate.Run:
    free = [0.0] * p
    order = one_f_one_b(p, m).rows
    return simulate.run(simulate.pipeline(order, [1.0] * p, [2.0] * p, free, free))


@given(STAGES, MICROBATCHES)
def test_bubble_of_equal_stages_and_free_communication_is_the_closed_form(p: int, m: int) -> None:
    run = equal_stages(p, m)
    assert run.step_s == 3 * (m + p - 1)
    assert run.bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=5), st.integers(1, 12))
def test_the_slowest_stage_bounds_an_uneven_pipeline(seconds: list[float], m: int) -> None:
    p = len(seconds)
    order = one_f_one_b(p, m).rows
    run = simulate.run(simulate.pipeline(order, seconds, seconds, [0.0] * p, [0.0] * p))
    # One microbatch through everything, and the others through the slowest stage.
    assert run.step_s >= 2 * m * max(seconds) - 1e-9
    assert run.step_s <= 2 * (sum(seconds) + (m - 1) * sum(seconds)) + 1e-9
    even = equal_stages(p, m).bubble
    assert run.bubble >= 0 if len(set(seconds)) > 1 else run.bubble == pytest.approx(even)


@given(
    st.lists(st.floats(0, 5), min_size=4, max_size=4),
    st.lists(st.floats(0, 5), min_size=4, max_size=4),
    st.lists(st.floats(0, 2), min_size=4, max_size=4),
    st.integers(1, 9),
)
def test_simulation_runs_one_task_a_stream_and_nothing_before_what_it_needs(
    forward: list[float], backward: list[float], send: list[float], m: int
) -> None:
    tasks = simulate.pipeline(one_f_one_b(4, m).rows, forward, backward, send, send)
    run = simulate.run(tasks)
    assert len(run.tasks) == len(tasks)
    ended = {task.name: end_s for task, _, end_s in run.tasks}
    streams: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for task, start_s, end_s in run.tasks:
        streams.setdefault((task.rank, task.stream), []).append((start_s, end_s))
        assert all(ended[name] <= start_s for name in task.needs)
    for spans in streams.values():
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_communication_delays_a_pipeline() -> None:
    order = one_f_one_b(2, 4).rows
    slow = simulate.run(simulate.pipeline(order, [1, 1], [2, 2], [0.5, 0], [0, 0.5]))
    assert slow.step_s > equal_stages(2, 4).step_s
    assert slow.bubble > 1 / 5


def test_an_order_that_deadlocks_is_refused_with_the_action(tiny, two_ranks) -> None:
    plan = planner.make(tiny, two_ranks, "1f1b", microbatches=2)
    first, last = plan.order
    swapped = (Action(0, "B", 0), *(action for action in first if action != Action(0, "B", 0)))
    with pytest.raises(FormatError, match="0B0 waits for 1B0 waits for 1F0 waits for 0F0"):
        check.check(replace(plan, order=(swapped, last)))


def test_an_order_that_forgets_a_backward_is_refused(tiny, two_ranks) -> None:
    plan = planner.make(tiny, two_ranks, "1f1b", microbatches=2)
    with pytest.raises(FormatError, match="missing: 1B1"):
        check.check(replace(plan, order=(plan.order[0], plan.order[1][:-1])))


def test_tasks_that_wait_for_each_other_are_named() -> None:
    tasks = [
        simulate.Task("a", 0, "compute", 1.0, "forward", ("b",)),
        simulate.Task("b", 1, "compute", 1.0, "forward", ("a",)),
    ]
    with pytest.raises(ValueError, match="a, b"):
        simulate.run(tasks)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.data())
def test_partition_is_as_good_as_trying_every_cut(seconds: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(seconds)))

    def longest(starts: tuple[int, ...]) -> int:
        ends = (*starts[1:], len(seconds))
        return max(sum(seconds[a:b]) for a, b in zip(starts, ends, strict=True))

    cuts = itertools.combinations(range(1, len(seconds)), parts - 1)
    best = min(longest((0, *cut)) for cut in cuts)
    assert longest(chain.partition(seconds, parts)) == best
