"""The known schedules: closed forms, published memory, torch's own tables."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import UsageError
from toolkit.plan.order import Stage, action, bounds, clock, deadlock
from toolkit.plan.order.families import FAMILIES, build
from toolkit.plan.order.interleaved import interleaved, looped_bfs
from toolkit.plan.order.shared import interlaced, interlaced_costs, three_f_one_b
from toolkit.plan.order.simple import gpipe, one_f_one_b
from toolkit.plan.order.vee import dualpipe_v, zb_v
from toolkit.plan.order.zero_bubble import zb_h1, zb_h2

SIZES = [(1, 1), (1, 4), (2, 4), (3, 9), (4, 8), (4, 12), (8, 24)]
# (tF, tI, tW); zero-bubble formulas assume that W takes no longer than F.
TIMES = [(1, 1, 1), (3, 4, 2), (2, 3, 1), (5, 5, 4), (2, 3, 2), (3, 2, 3)]


def peaks(schedule):
    return [schedule.peak_memory(device) for device in range(schedule.problem.num_devices)]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("p", "m"), [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)])
def test_every_table_runs_keeps_all_rules_and_survives_its_text(name, p, m):
    order = build(name, p, m)
    problem = order.problem()
    assert deadlock.find(problem, order.rows) == []
    schedule = clock.run(order, Stage(1.5, 1, 0.75), delay=0.25)
    schedule.check()
    assert schedule.rows == order.rows
    assert schedule.makespan >= bounds.makespan(schedule.problem).value - 1e-9
    assert action.read(action.write(order.rows)) == order.rows
    # One forward and one whole (or split) backward of every microbatch through every stage.
    for stage in range(len(order.placement)):
        for i in range(m):
            kinds = {a.kind for a in problem.index if (a.stage, a.microbatch) == (stage, i)}
            assert kinds == {"F"} if stage in order.no_grad else kinds in ({"F", "B"}, set("FIW"))


@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize("make", [gpipe, one_f_one_b])
def test_bubble_of_gpipe_and_1f1b(make, p, m):
    """(p - 1) / (m + p - 1), whatever forward and backward take: arXiv 2104.04473, section 2.2."""
    for forward, backward in ((1, 1), (1, 2), (3, 4)):
        schedule = clock.run(make(p, m), Stage(forward, backward, 0))
        assert schedule.makespan == (m + p - 1) * (forward + backward)
        assert schedule.bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_alive_microbatches_of_gpipe_and_1f1b(p, m):
    assert peaks(clock.run(gpipe(p, m))) == [m] * p
    assert peaks(clock.run(one_f_one_b(p, m))) == [min(m, p - d) for d in range(p)]


@pytest.mark.parametrize(("p", "groups", "v"), itertools.product((2, 3, 4), (1, 2, 4), (1, 2, 3)))
def test_interleaving_divides_the_bubble_by_the_chunks(p, groups, v):
    """Bubble time (p - 1)(tF + tB) / v of a whole stage's tF and tB: arXiv 2104.04473, 2.2."""
    m = p * groups
    whole = Stage(v, 2 * v, 0)
    chunk = Stage(1, 2, 0)
    schedule = clock.run(interleaved(p, m, v), chunk)
    expected = (p - 1) * (whole.forward + whole.input_grad) / v
    assert [schedule.idle(d) for d in range(p)] == [expected] * p
    # Device 0 holds pv + p - 1 chunks, a share 1 + (p - 1)/(pv) of 1F1B's: arXiv 2205.05198, 4.2.3.
    if m > p and v > 1:
        assert max(peaks(schedule)) == p * v + p - 1
    breadth = clock.run(looped_bfs(p, m, v), chunk)
    assert [breadth.idle(d) for d in range(p)] == [expected] * p
    assert peaks(breadth) == [m * v] * p


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 4), (3, 9), (4, 8), (4, 12), (8, 24)])
def test_zero_bubble_times_and_memory(p, m, times):
    """Table 2 of arXiv 2401.10241: bubbles and p or 2p - 1 microbatches alive."""
    f, i, w = times
    h1 = clock.run(zb_h1(p, m), Stage(f, i, w))
    assert max(h1.stall(d) for d in range(p)) == (p - 1) * (f + i - w)
    assert peaks(h1) == [p] * p
    h2 = clock.run(zb_h2(p, m), Stage(f, i, w))
    assert max(h2.stall(d) for d in range(p)) == max(0, (p - 1) * (f + i - 2 * w))
    assert peaks(h2) == [2 * p - 1] * p


@pytest.mark.parametrize(("p", "m"), [(2, 4), (3, 9), (4, 8), (6, 11)])
def test_zb_v_has_no_bubble_and_the_memory_of_1f1b(p, m):
    """arXiv 2401.10241, section 6: p microbatches of two chunks (2p halves) on every device."""
    schedule = clock.run(zb_v(p, m))
    assert [schedule.stall(d) for d in range(p)] == [0] * p
    assert peaks(schedule) == [2 * p] * p


@pytest.mark.parametrize(("p", "m"), [(1, 2), (2, 4), (3, 9), (4, 8), (4, 16)])
def test_dualpipe_v_holds_one_chunk_more_than_its_stages(p, m):
    """Activations of PP + 1 chunks, PP = 2p stages (table in DeepSeek's DualPipe repository)."""
    schedule = clock.run(dualpipe_v(p, m))
    assert peaks(schedule) == [2 * p + 1] * p
    assert schedule.makespan == 6 * m + p - 1 == bounds.makespan(schedule.problem).value


@pytest.mark.parametrize(("p", "m"), [(1, 2), (2, 2), (3, 9), (4, 4), (4, 8), (8, 16), (8, 32)])
def test_3f1b_has_only_the_ramps_of_1f1b(p, m):
    """m (3 tF + tB) + (p - 1)(tF + tB), which the bound shows to be the least possible."""
    order = three_f_one_b(p, m)
    schedule = clock.run(order)
    assert schedule.makespan == m * (3 + 2) + (p - 1) * (1 + 2)
    assert bounds.makespan(schedule.problem).value == schedule.makespan
    assert max(peaks(schedule)) <= p
    assert order.no_grad == set(range(2 * p))


def test_3f1b_with_one_forward_is_a_pipeline_of_ordinary_stages():
    order = three_f_one_b(3, 6, num_forwards=1)
    assert clock.run(order).makespan == clock.run(one_f_one_b(3, 6)).makespan


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 4), (4, 6), (4, 16)])
def test_interlaced_runs_shared_blocks_in_one_order_with_the_memory_of_1f1b(p, m):
    order = interlaced(p, m)
    shared = [[a for a in row if a.stage in (0, p + 1)] for row in order.rows]
    assert all(row == shared[0] for row in shared)
    costs = interlaced_costs(p, Stage(1, 1, 0, 0), Stage(1, 1, 2, 1))
    assert peaks(clock.run(order, costs)) == [min(m, p - d) for d in range(p)]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: gpipe(0, 4), "0 devices"),
        (lambda: one_f_one_b(2, 0), "0 microbatches"),
        (lambda: interleaved(4, 6), "6 is not a multiple"),
        (lambda: dualpipe_v(4, 7), "at least 8 microbatches"),
        (lambda: build("1f1", 4, 8), "did you mean '1f1b'"),
    ],
)
def test_wrong_requests_say_what_is_wrong(make, said):
    with pytest.raises(UsageError, match=said):
        make()


@given(st.sampled_from(sorted(FAMILIES)), st.integers(1, 4), st.integers(1, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_unequal_stages_and_delays_never_break_a_table(name, p, groups, data):
    order = build(name, p, 2 * p * groups)
    span = st.integers(1, 9)
    stages = [Stage(data.draw(span), data.draw(span), data.draw(span)) for _ in order.placement]
    delays = [data.draw(st.integers(0, 3)) for _ in order.placement[1:]]
    schedule = clock.run(order, stages, delay=delays)
    schedule.check()
    assert schedule.makespan >= bounds.makespan(schedule.problem).value - 1e-9


def mock_rows(name, p, m):
    """The rows torch computes for a schedule of 2p stages, idle steps left out."""
    from unittest import mock

    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    kind = getattr(schedules, name)

    def stage(index):
        found = mock.Mock(group_size=p, num_stages=2 * p, stage_index=index, group_rank=0)
        found.has_backward = True
        return found

    # Communication is torch's own business; its rows of computation are what is compared.
    with (
        mock.patch.object(schedules._PipelineScheduleRuntime, "_prepare_schedule_with_comms"),
        mock.patch.object(schedules, "_check_torch_compile_compatibility"),
    ):
        made = kind([stage(0), stage(2 * p - 1)], m, loss_fn=lambda *_: None)
    rows = []
    for rank in range(p):
        row = []
        for entry in made.pipeline_order[rank]:
            if entry is not None:
                row += [str(part) for part in entry.sub_actions or [entry]]
        rows.append(tuple(map(action.Action.parse, row)))
    return tuple(rows)


@pytest.mark.parametrize(
    ("name", "make", "fewest"),
    [
        ("ScheduleZBVZeroBubble", zb_v, lambda p: 1),
        ("ScheduleDualPipeV", dualpipe_v, lambda p: 2 * p),
    ],
)
def test_v_tables_are_those_torch_runs(name, make, fewest):
    for p in range(1, 6):
        for m in range(fewest(p), 14):
            assert make(p, m).rows == mock_rows(name, p, m), (p, m)
