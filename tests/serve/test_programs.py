"""Programs: who a call belongs to, what its program was given, and the order that follows."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import UsageError
from toolkit.serve.batch import Batch
from toolkit.serve.kv import prefix
from toolkit.serve.kv.blocks import BlockPool
from toolkit.serve.policy import (
    FeedbackQueue,
    FirstComeFirstServed,
    Policy,
    ProgramLeastAttained,
    QueueConfig,
    ThreadedLeastAttained,
)
from toolkit.serve.policy.srpt import ShortestRemainingProgram
from toolkit.serve.programs.identity import CARRIERS, PrefixInference, identify
from toolkit.serve.programs.table import ProcessTable, ServiceUnit, State
from toolkit.serve.request import Phase, Request, SamplingParams
from toolkit.serve.scheduler import Scheduler, SchedulerConfig

# Decode steps of each call of four programs (Autellix, figure 2), two at a time.
FIGURE_2 = {"A": (4, 3, 1, 1), "B": (3, 3, 4), "C": (1, 2), "D": (4,)}


class Machine:
    """A scheduler whose steps all last a second: prompts of one token, nothing else but calls."""

    def __init__(self, policy: Policy, slots: int, unit: ServiceUnit | None = None) -> None:
        pool = BlockPool(16, 16)
        config = SchedulerConfig(
            max_batch=slots, step_tokens=64, max_context=250, prefix_cache=False
        )
        self.scheduler = Scheduler(config, pool, policy, policy, ProcessTable(unit))
        self.now = 0.0
        self.waited: dict[str, float] = {}
        self.served: dict[str, int] = {}
        self.order: list[tuple[str, ...]] = []

    def add(self, name: str, program: str | None, steps: int) -> None:
        request = Request(
            name, (1,), SamplingParams(max_tokens=steps, ignore_eos=True),
            arrival_s=self.now, program_id=program,
        )  # fmt: skip
        self.scheduler.add(request, self.now)

    def step(self) -> list[Request]:
        """A step of one second; returns the calls that ended with it."""
        batch: Batch = self.scheduler.schedule(self.now)
        names = [piece.request.id for piece in batch.slices]
        assert len(set(names)) == len(names)
        room = self.scheduler.config.max_batch
        unserved = self.scheduler.num_running + self.scheduler.queue.num_requests
        assert len(names) == min(room, unserved), "a place is empty and somebody waits"
        self.order.append(tuple(names))
        self.now += 1.0
        drawn = self.scheduler.update(batch, [7] * len(names), self.now, 1.0)
        ended = [token.request for token in drawn if token.finish_reason is not None]
        for request in ended:
            self.waited[request.id] = request.waited_s
            self.served[request.id] = len(request.output_ids)
        self.scheduler.check_integrity()
        return ended

    def run_chains(self, programs: dict[str, tuple[int, ...]]) -> float:
        """Run programs whose calls follow one another; return the sum of waiting."""
        for program, steps in programs.items():
            self.add(f"{program}0", program, steps[0])
        while self.scheduler.has_work:
            for request in self.step():
                program, index = request.id[0], int(request.id[1:]) + 1
                if index < len(programs[program]):
                    self.add(f"{program}{index}", program, programs[program][index])
        return sum(self.waited.values())


def config(**changed: Any) -> QueueConfig:
    given_: dict[str, Any] = {
        "bounds": (1.0, 2.0, 4.0), "quanta": (1.0, 1.0, 2.0, math.inf),
        "beta": None, "max_wait_s": None, "min_stay_s": 0.0,
    }  # fmt: skip
    return QueueConfig(**(given_ | changed))


class TestFigure2:
    def test_first_come_first_served_waits_18(self) -> None:
        machine = Machine(FirstComeFirstServed(), 2)
        assert machine.run_chains(FIGURE_2) == 18
        assert machine.now == 14

    def test_by_program_waits_less(self) -> None:
        machine = Machine(ProgramLeastAttained(config(preempts=False)), 2)
        assert machine.run_chains(FIGURE_2) < 18


chains = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=6)


class TestOrders:
    @settings(max_examples=60, deadline=None)
    @given(chains, st.integers(1, 3), st.booleans())
    def test_atlas_is_plas_on_chains(self, made, slots, preempts) -> None:
        programs = {chr(65 + index): tuple(steps) for index, steps in enumerate(made)}
        runs = []
        for kind in (ProgramLeastAttained, ThreadedLeastAttained):
            machine = Machine(kind(config(preempts=preempts)), slots)
            machine.run_chains(programs)
            runs.append(machine.order)
        assert runs[0] == runs[1]

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(1, 8), min_size=1, max_size=10), st.integers(1, 3), st.booleans())
    def test_plas_on_single_calls_is_mlfq(self, made, slots, with_programs) -> None:
        runs = []
        for kind in (ProgramLeastAttained, FeedbackQueue, ThreadedLeastAttained):
            machine = Machine(kind(config()), slots)
            for index, steps in enumerate(made):
                machine.add(f"r{index}", f"p{index}" if with_programs else None, steps)
            while machine.scheduler.has_work:
                machine.step()
            runs.append(machine.order)
        assert runs[0] == runs[1] == runs[2]

    @settings(max_examples=60, deadline=None)
    @given(chains, st.integers(1, 3), st.sampled_from(["fcfs", "feedback", "plas", "atlas"]))
    def test_every_token_once_and_no_place_left_empty(self, made, slots, name) -> None:
        """Work conservation is asserted at every step; service adds up to what was asked for."""
        programs = {chr(65 + index): tuple(steps) for index, steps in enumerate(made)}
        policy: Policy = {
            "fcfs": FirstComeFirstServed,
            "feedback": lambda: FeedbackQueue(config(preempts=False)),
            "plas": lambda: ProgramLeastAttained(config(preempts=False)),
            "atlas": lambda: ThreadedLeastAttained(config(preempts=False)),
        }[name]()
        machine = Machine(policy, slots)
        machine.run_chains(programs)
        assert sum(machine.served.values()) == sum(map(sum, programs.values()))
        assert len(machine.served) == sum(map(len, programs.values()))

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=2, max_size=12))
    def test_keys_order_all_calls(self, made) -> None:
        """Total: no two calls have the same key, so every run is the same."""
        policy = ProgramLeastAttained(config())
        machine = Machine(policy, 2)
        for index, (program, steps) in enumerate(made):
            machine.add(f"r{index}", f"p{program}", steps)
        for _ in range(3):
            open_ = [*machine.scheduler.queue, *machine.scheduler.running]
            keys = [policy.key(call, call.program, machine.now) for call in open_]
            assert len(set(keys)) == len(keys)
            if machine.scheduler.has_work:
                machine.step()

    @settings(max_examples=30, deadline=None)
    @given(st.integers(5, 25), st.integers(1, 2))
    def test_nobody_waits_beyond_the_limit_and_those_promoted_before(self, limit, slots) -> None:
        """A call of an old program beside a flood of new ones: served once `max_wait_s` is over."""
        policy = ProgramLeastAttained(config(max_wait_s=float(limit), preempts=True))
        machine = Machine(policy, slots)
        machine.add("old0", "old", 5)
        while machine.scheduler.has_work:
            machine.step()
        machine.add("old1", "old", 2)
        sent = machine.now
        for index in range(4 * limit):
            for slot in range(slots):
                machine.add(f"new{index}-{slot}", f"new{index}-{slot}", 1)
            if any(request.id == "old1" for request in machine.step()):
                break
        request_waited = machine.waited.get("old1")
        assert request_waited is not None, "starved"
        # In the first queue from then on, behind those of it that came before.
        assert machine.now - sent <= 2 * limit + 4
        assert policy.num_promotions >= 1

    def test_a_ratio_promotes_too(self) -> None:
        policy = ProgramLeastAttained(config(beta=2.0))
        machine = Machine(policy, 1)
        machine.add("old0", "old", 5)
        while machine.scheduler.has_work:
            machine.step()
        machine.add("old1", "old", 1)
        for index in range(40):
            machine.add(f"new{index}", f"new{index}", 1)
            machine.step()
        # 5 seconds of service: from 10 seconds of waiting on it is in the first queue again.
        assert policy.num_promotions == 1

    def test_the_shortest_remaining_program_goes_first(self) -> None:
        left = {"long": 9.0, "short": 1.0}
        machine = Machine(ShortestRemainingProgram(lambda call: left[call.id]), 1)
        machine.add("long", "a", 3)
        machine.add("short", "b", 1)
        machine.step()
        assert machine.order[0] == ("short",)

    def test_service_in_tokens_does_not_depend_on_time(self) -> None:
        unit = ServiceUnit(per_prompt_token=1.0, per_output_token=2.0)
        machine = Machine(ProgramLeastAttained(config(unit=unit)), 1, unit)
        machine.add("a0", "a", 3)
        while machine.scheduler.has_work:
            machine.step()
        program = machine.scheduler.programs.get("a")
        assert program is not None
        assert program.service == 1.0 + 2.0 * 3
        assert program.served_s == 3.0

    @pytest.mark.parametrize(
        "wrong",
        [{"bounds": (2.0, 1.0)}, {"bounds": (0.0,)}, {"quanta": (1.0,)}, {"beta": 0.0},
         {"max_wait_s": 0.0}, {"min_stay_s": -1.0}],
    )  # fmt: skip
    def test_nonsense_is_refused(self, wrong) -> None:
        with pytest.raises(UsageError):
            QueueConfig(**wrong)


class TestTable:
    def call(self, name: str, program: str | None, now: float, table: ProcessTable) -> Request:
        request = Request(name, (1, 2), SamplingParams(max_tokens=4), arrival_s=now,
                          program_id=program, since_s=now)  # fmt: skip
        request.program = table.on_arrival(request, now)
        return request

    def test_a_call_of_no_program_leaves_no_trace(self) -> None:
        table = ProcessTable()
        assert self.call("a", None, 0.0, table).program is None
        assert len(table) == 0

    def test_an_idle_program_is_closed_and_a_new_call_opens_it_anew(self) -> None:
        table = ProcessTable(idle_s=10.0)
        first = self.call("a", "p", 0.0, table)
        table.on_complete(first, 1.0)
        program = table.get("p")
        assert program is not None
        assert program.state is State.IDLE
        self.call("b", "q", 5.0, table)
        assert table.get("p") is program
        self.call("c", "q", 12.0, table)
        assert table.get("p") is None
        assert table.num_expired == 1
        assert self.call("d", "p", 12.0, table).program is not program
        table.check_integrity()

    def test_an_end_waits_for_open_calls(self) -> None:
        table = ProcessTable()
        open_ = self.call("a", "p", 0.0, table)
        assert table.end("p")
        assert table.get("p") is not None
        table.on_complete(open_, 1.0)
        assert table.get("p") is None
        assert not table.end("p")

    def test_the_longest_idle_makes_room(self) -> None:
        table = ProcessTable(most=2)
        for index in range(4):
            table.on_complete(self.call(f"c{index}", f"p{index}", index, table), index + 0.5)
        assert [program.id for program in table] == ["p2", "p3"]
        table.check_integrity()

    def test_a_chain_is_the_longest_one(self) -> None:
        """Two at once after a root: the critical path counts the longer of them."""
        table = ProcessTable()
        root = self.call("r", "p", 0.0, table)
        root.served_s = 2.0
        table.on_complete(root, 2.0)
        left, right = (self.call(name, "p", 2.0, table) for name in "lr")
        left.served_s, right.served_s = 1.0, 5.0
        table.on_complete(left, 3.0)
        table.on_complete(right, 7.0)
        program = table.get("p")
        assert program is not None
        assert (program.service, program.critical) == (8.0, 7.0)
        (row,) = table.rows(7.0)
        assert row["state"] == "idle"


class TestIdentity:
    @pytest.mark.parametrize("carrier", [c for c in CARRIERS if c.says == "program"])
    def test_every_carrier_is_read(self, carrier) -> None:
        headers: dict[str, str] = {}
        body: dict[str, Any] = {}
        if carrier.kind == "header":
            headers[carrier.path[0].title()] = "me"
        else:
            inner: Any = "me"
            for step in reversed(carrier.path):
                inner = {step: inner}
            body = inner
        found = identify(headers, body)
        assert found is not None
        assert (found.program_id, found.source) == ("me", carrier.source)

    def test_the_more_specific_counts_and_an_end_is_heard(self) -> None:
        found = identify(
            {"X-Program-Id": "a", "X-Session-ID": "b", "X-Program-End": "true"},
            {"user": "c", "thread_id": 3},
        )
        assert found is not None
        assert (found.program_id, found.thread_id, found.ends) == ("a", "3", True)

    @pytest.mark.parametrize("value", ["", "x" * 257, "a\nb", ["a"], True])
    def test_what_is_no_name_is_refused(self, value) -> None:
        with pytest.raises(UsageError):
            identify({}, {"program_id": value})

    def test_a_context_that_goes_on_is_the_same_program(self) -> None:
        inference = PrefixInference(least_blocks=2, most=3)

        def names(*blocks: int) -> list[bytes]:
            found: list[bytes] = []
            for block in blocks:
                found.append(prefix.name(found[-1] if found else prefix.root(), [block]))
            return found

        inference.note(names(1, 2, 3), "p")
        assert inference.find(names(1, 2, 3, 4, 5)) == "p"
        assert inference.find(names(1, 2, 4)) is None
        assert inference.find(names(9, 2, 3, 4)) is None
        for index in range(4):
            inference.note(names(index + 10, 1), f"q{index}")
        assert inference.find(names(1, 2, 3, 4)) is None


def test_a_request_knows_its_times() -> None:
    machine = Machine(FirstComeFirstServed(), 1)
    machine.add("a", "p", 2)
    machine.add("b", "p", 1)
    machine.step()
    waiting = next(iter(machine.scheduler.queue))
    assert (waiting.id, waiting.waiting_s(1.0), waiting.service_s(1.0)) == ("b", 1.0, 0.0)
    machine.step()
    machine.step()
    assert waiting.phase is Phase.DECODE
    assert (waiting.waited_s, waiting.served_s) == (2.0, 1.0)
