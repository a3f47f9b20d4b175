from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import FormatError
from toolkit.plan import chain, check, planner
from toolkit.plan.order import clock, families, search, shared
from toolkit.plan.order.action import Action
from toolkit.plan.order.pipeline import Order, Stage
from toolkit.plan.predict import events, simulate
from toolkit.plan.predict.costs import Call
from toolkit.plan.predict.passes import Piece, Step
from toolkit.plan.predict.script import Held, Script, Transfer

# Other work on the machine is no reason to fail.
unhurried = settings(deadline=None)

STAGES, MICROBATCHES = st.integers(1, 6), st.integers(1, 16)
SECONDS = st.floats(0.1, 10)


def script_of(
    order: Order, costs: Sequence[Stage], delay: float = 0.0, calls: float = 0.0
) -> Script:
    """A script whose stages take these seconds, and results `delay` to reach another device."""
    held: dict[tuple[int, int], Held] = {}
    transfers: dict[tuple[int, str], Transfer] = {}
    wait = (Call("all_reduce", 1, calls),) if calls else ()
    for stage, places in enumerate(order.placement):
        steps = {kind: (Step(costs[stage].span(kind), wait),) for kind in "FBIW"}
        for place in places:
            held[stage, place] = Held((Piece(None, steps),))
        for kind, other in (("F", stage + 1), ("B", stage - 1)):
            if 0 <= other < len(order.placement):
                outside = tuple(p for p in order.placement[other] if p not in places)
                send = Call("send", 1, delay, "peer")
                if outside and delay:
                    transfers[stage, kind] = Transfer(places[0], outside, (send,))
    return Script(order, tuple(range(order.num_devices)), held, transfers)


def timed(order: Order, costs: Sequence[Stage], delay: float = 0.0) -> simulate.Run:
    return simulate.run(events.tasks(script_of(order, costs, delay)))


def equal_stages(p: int, m: int, cost: Stage = Stage(1, 1, 1), name: str = "1f1b") -> simulate.Run:  # noqa: B008
    order = families.build(name, p, m)
    return timed(order, [cost] * len(order.placement))


@unhurried
@given(STAGES, MICROBATCHES)
def test_bubble_of_1f1b_and_gpipe_is_the_closed_form(p: int, m: int) -> None:
    """Equal stages, free communication: (p - 1) / (m + p - 1)."""
    for name in ("1f1b", "gpipe"):
        run = equal_stages(p, m, name=name)
        assert run.step_s == 3 * (m + p - 1)
        assert run.bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)


@unhurried
@given(STAGES, st.integers(1, 4))
def test_interleaving_divides_the_bubble_by_the_chunks(p: int, groups: int) -> None:
    m = groups * p
    run = equal_stages(p, m, name="interleaved")
    assert run.step_s == pytest.approx(3 * (2 * m + p - 1))
    assert run.bubble == pytest.approx((p - 1) / (2 * m + p - 1), abs=1e-12)


@unhurried
@given(STAGES, st.integers(0, 8))
def test_halves_of_backward_fill_the_bubble(p: int, more: int) -> None:
    """ZB-H1 idles for (p - 1)(F + I - W), and ZB-H2 and ZB-V, of equal F, I and W, only at their
    ends.
    """
    m = 2 * p - 1 + more
    assert equal_stages(p, m, name="zb-h1").step_s == pytest.approx(3 * m + p - 1)
    assert equal_stages(p, m, name="zb-h2").step_s == pytest.approx(3 * m + p - 1)
    assert equal_stages(p, m, name="zb-v").step_s == pytest.approx(6 * m + p - 1)


@unhurried
@given(
    st.sampled_from(sorted(families.FAMILIES)),
    st.integers(1, 5),
    st.integers(1, 4),
    st.lists(st.tuples(SECONDS, SECONDS, SECONDS), min_size=15, max_size=15),
    st.sampled_from([0.0, 0.5]),
)
def test_every_family_takes_what_its_order_says(
    name: str, p: int, groups: int, seconds: list[tuple[float, float, float]], delay: float
) -> None:
    """The same makespan as the schedules' own clock, any costs; stages on several devices too."""
    order = families.build(name, p, 2 * p * groups)
    costs = [Stage(*one) for one in seconds[: len(order.placement)]]
    expected = clock.run(order, costs, delay=delay).makespan
    found = timed(order, costs, delay).step_s
    # What a device sends at once to both sides goes one after the other here.
    assert found >= expected - 1e-9 if delay else found == pytest.approx(expected)


def test_the_published_interlaced_schedule_takes_what_was_published() -> None:
    """4 devices, 6 microbatches, shared blocks of 1, layers of 1 and 3: our order takes at most
    the 60 of SuperScaler's artifact, of which each device works 48.
    """
    found = search.search(shared.published_interlaced(), 6, time_limit_s=5)
    order = Order("searched", _published_placement(), 6, found.schedule.rows)
    costs = shared.interlaced_costs(4, Stage(1, 1, 0), Stage(1, 1, 2))
    run = timed(order, costs)
    assert run.step_s <= 60
    assert run.bubble == pytest.approx(1 - 48 / run.step_s)


def _published_placement() -> tuple[tuple[int, ...], ...]:
    everyone = (0, 1, 2, 3)
    return (everyone, (0,), (1,), (2,), (3,), everyone)


@unhurried
@given(st.lists(SECONDS, min_size=2, max_size=5), st.integers(1, 12), st.floats(0, 2))
def test_waiting_inside_a_stage_is_idle_time(seconds: list[float], m: int, wait: float) -> None:
    order = families.build("1f1b", len(seconds), m)
    costs = [Stage(one, one, one) for one in seconds]
    without = timed(order, costs)
    run = simulate.run(events.tasks(script_of(order, costs, calls=wait)))
    assert run.step_s >= without.step_s + 2 * m * wait - 1e-9
    if wait:
        assert run.bubble > 0


@unhurried
@given(
    st.sampled_from(["1f1b", "zb-v", "interlaced", "3f1b"]),
    st.lists(st.tuples(SECONDS, SECONDS, SECONDS), min_size=12, max_size=12),
    st.floats(0, 2),
)
def test_simulation_runs_one_task_a_stream_and_nothing_before_what_it_needs(
    name: str, seconds: list[tuple[float, float, float]], delay: float
) -> None:
    order = families.build(name, 4, 8)
    costs = [Stage(*one) for one in seconds[: len(order.placement)]]
    tasks = list(events.tasks(script_of(order, costs, delay)))
    run = simulate.run(tasks)
    assert len(run.tasks) == len(tasks)
    ended = {task.key: end_s for task, _, end_s in run.tasks}
    streams: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for task, start_s, end_s in run.tasks:
        streams.setdefault((task.rank, task.stream), []).append((start_s, end_s))
        assert all(ended[key] <= start_s for key in task.needs)
    for spans in streams.values():
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_communication_delays_a_pipeline() -> None:
    order = families.build("1f1b", 2, 4)
    slow = timed(order, [Stage()] * 2, 0.5)
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


@unhurried
@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.data())
def test_partition_is_as_good_as_trying_every_cut(seconds: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(seconds)))

    def longest(starts: tuple[int, ...]) -> int:
        ends = (*starts[1:], len(seconds))
        return max(sum(seconds[a:b]) for a, b in zip(starts, ends, strict=True))

    cuts = itertools.combinations(range(1, len(seconds)), parts - 1)
    best = min(longest((0, *cut)) for cut in cuts)
    assert longest(chain.partition(seconds, parts)) == best
