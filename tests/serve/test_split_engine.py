"""The divided engine: the undivided one's tokens, no unit computed on twice, steady layouts."""

from __future__ import annotations

import itertools
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import InfeasibleError, UsageError
from toolkit.hardware.share import Share, check_disjoint
from toolkit.serve.batch import Batch, StepResult
from toolkit.serve.clock import VirtualClock
from toolkit.serve.kv.blocks import BlockPool
from toolkit.serve.policy import make
from toolkit.serve.request import Phase
from toolkit.serve.scheduler import Scheduler, SchedulerConfig
from toolkit.serve.split import layouts
from toolkit.serve.split.controller import (
    Controller,
    ControllerConfig,
    Decision,
    Dynamic,
    Fixed,
)
from toolkit.serve.split.engine import DividedEngine
from toolkit.serve.split.search import Mode, SearchConfig
from toolkit.serve.split.weighing import Situation
from toolkit.serve.split.work import Load

sys.path.append(str(Path(__file__).parent))
from fake_engine import FakeExecutor, fake_engine, next_token, request, run
from split_cases import cost_model

COST = cost_model()
L20 = COST.device


class ConcurrentFake(FakeExecutor):
    """Two batches at once: what each reads and writes is checked, and that their units differ."""

    def __init__(self, clock: VirtualClock, pool: BlockPool, seed: int) -> None:
        super().__init__(clock, pool)
        self.random = random.Random(seed)
        self.flying: list[tuple[Batch, Share, StepResult]] = []
        self.together = 0

    def begin(self, batch: Batch, share: Share) -> None:
        check_disjoint([share, *(one[1] for one in self.flying)])
        # Computed at once, given back when it is this batch's turn.
        self.flying.append((batch, share, super().run(batch)))
        self.together += len(self.flying) > 1

    def wait(self) -> tuple[Batch, StepResult]:
        batch, _, result = self.flying.pop(self.random.randrange(len(self.flying)))
        return batch, result

    def successor(self) -> ConcurrentFake:
        return ConcurrentFake(self.clock, self.pool, 0)


class Restless(Fixed):
    """Another layout at every step."""

    def __init__(self, seed: int) -> None:
        super().__init__(COST, layouts.undivided(L20))
        self.random = random.Random(seed)

    def decide(self, look: object, now: float) -> Decision:
        choices = [layouts.undivided(L20), *layouts.divided(L20)[::7]]
        return Decision(self.random.choice(choices), now, "restless")


def divided_engine(
    controller: Controller, *, seed: int = 0, num_blocks: int = 40, prefill: str = "spf"
) -> tuple[DividedEngine, ConcurrentFake]:
    clock, pool = VirtualClock(), BlockPool(num_blocks, 4)
    executor = ConcurrentFake(clock, pool, seed)
    limits = SchedulerConfig(max_batch=6, step_tokens=16, max_context=num_blocks * 4)
    scheduler = Scheduler(limits, pool, make(prefill), make("fcfs"))
    return DividedEngine(scheduler, executor, clock, controller), executor


calls = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(0, 30)), min_size=1, max_size=12
)


def controllers(seed: int) -> dict[str, Controller]:
    quick = ControllerConfig(dwell_s=0.0, interval_s=0.0)
    return {
        "undivided": Fixed(COST, layouts.undivided(L20)),
        "static": Fixed(COST, layouts.at(L20, 46)),
        "apart": Fixed(COST, layouts.apart(L20, replace(L20, name="other"))),
        "nexus": Dynamic(COST, replace(quick, may_undivide=False)),
        "auto": Dynamic(COST, quick),
        "restless": Restless(seed),
    }


@settings(max_examples=150, deadline=None)
@given(calls, st.sampled_from(list(controllers(0))), st.integers(0, 9), st.integers(26, 60))
def test_its_tokens_are_the_undivided_engines(calls, kind, seed, num_blocks) -> None:
    """Whatever the layout does, and however small the memory: same tokens, nothing left over."""
    engine, _ = divided_engine(controllers(seed)[kind], seed=seed, num_blocks=num_blocks)
    made = [request(f"r{at}", prompt, output) for at, (prompt, output, _) in enumerate(calls)]
    waiting = sorted(
        zip((when for _, _, when in calls), made, strict=True), key=lambda each: each[0]
    )
    for step in range(5000):
        while waiting and waiting[0][0] <= step:
            engine.add(waiting.pop(0)[1])
        if engine.has_work:
            engine.step()
        elif not waiting:
            break
        engine.scheduler.check_integrity()
    assert not engine.has_work
    assert engine.scheduler.pool.num_used == 0
    alone, _ = fake_engine(num_blocks=num_blocks, block_size=4)
    for each in made:
        twin = replace_request(each)
        alone.add(twin)
        run(alone)
        assert each.output_ids == twin.output_ids
        assert each.output_ids[0] == next_token(replace_request(each))


def replace_request(old):
    return request(old.id, len(old.prompt_ids), old.sampling.max_tokens)


def test_both_phases_are_in_flight_at_once() -> None:
    engine, executor = divided_engine(Fixed(COST, layouts.at(L20, 46)))
    for at in range(4):
        engine.add(request(f"r{at}", 30, 12))
    run(engine)
    assert executor.together > 0
    assert engine.num_steps["prefill"]
    assert engine.num_steps["decode"]
    assert not engine.num_steps["mixed"]
    assert {span.track for span in engine.timeline().spans} >= {"prefill", "decode"}


def test_a_phase_that_is_alone_has_the_whole_device() -> None:
    engine, executor = divided_engine(Fixed(COST, layouts.at(L20, 46)))
    shares: list[Share] = []
    begin = executor.begin
    executor.begin = lambda batch, share: (shares.append(share), begin(batch, share))[1]
    engine.add(request("only", 30, 12))
    run(engine)
    assert {share.units for share in shares} == {L20.num_units}


def test_an_engine_that_died_has_a_successor_that_knows_the_device() -> None:
    controller = Dynamic(COST)
    engine, _ = divided_engine(controller)
    engine.add(request("lost", 30, 12))
    engine.step()
    after = engine.successor()
    assert not after.has_work
    assert after.controller is controller
    assert isinstance(after.executor, ConcurrentFake)
    after.executor.pool = after.scheduler.pool
    after.add(request("next", 30, 12))
    run(after)


# -- the controller -------------------------------------------------------------------------------


@dataclass
class World:
    """What a controller is asked about, with noise on demand."""

    prompt: int = 2048
    decoding: int = 24
    context: int = 3000
    waiting: int = 2
    kv_usage: float = 0.3

    def situation(self, source: random.Random | None = None, noise: float = 0.0) -> Situation:
        def near(value: int) -> int:
            return (
                max(1, round(value * (1 + noise * (2 * source.random() - 1)))) if source else value
            )

        decoding = near(self.decoding)
        return Situation(
            Load.chunk(0, near(self.prompt), samples=1),
            Load.decoding(decoding, decoding * near(self.context)),
            self.waiting,
            decoding,
            self.kv_usage,
        )


EAGER = ControllerConfig(dwell_s=0.0, interval_s=0.0)
NEXUS = replace(EAGER, may_undivide=False)


class TestDynamic:
    def test_the_mode_moves_the_cut(self) -> None:
        """Where both slacks can be kept, the mode gives its own phase what is left."""
        wide = replace(NEXUS, search=SearchConfig(alpha=2.5, beta=2.0))
        controller = Dynamic(COST, wide)
        first = controller.decide(lambda: World(kv_usage=0.3).situation(), 0.0)
        assert first.mode is Mode.PREFILL
        then = controller.decide(lambda: World(kv_usage=0.9).situation(), 1.0)
        assert then.mode is Mode.DECODE
        assert then.layout.decode.units > first.layout.decode.units
        assert "decode first" in then.reason
        assert "predicted" in then.reason

    def test_slacks_that_contradict_each_other_turn_the_modes_round(self) -> None:
        """The paper's, on an L20's curves; left to itself, a full cache gives decode more."""
        paper = Dynamic(COST, NEXUS)
        first, then = (
            paper.decide(lambda: World(kv_usage=usage).situation(), at).layout  # noqa: B023
            for at, usage in enumerate((0.3, 0.9))
        )
        assert then.decode.units < first.decode.units
        crowd = World(decoding=200, waiting=1)
        ours = Dynamic(COST, EAGER)
        ours.decide(crowd.situation, 0.0)
        crowd.kv_usage = 0.9
        assert ours.decide(crowd.situation, 1.0).layout.decode.units > 46

    def test_its_cut_keeps_the_slack(self) -> None:
        for beta in (1.05, 1.1, 1.5, 3.0):
            config = replace(NEXUS, search=SearchConfig(beta=beta, delta=0.0))
            world = World().situation()
            layout = Dynamic(COST, config).decide(lambda: world, 0.0).layout  # noqa: B023
            limit_s = beta * COST.alone(world.decode, Phase.DECODE).seconds
            decode_s = COST.divided(world.prefill, world.decode, layout.prefill.fraction)[1]
            wider = layouts.at(L20, min(88, layout.prefill.units + 2))
            assert decode_s <= limit_s or layout.prefill.units == 4
            over = COST.divided(world.prefill, world.decode, wider.prefill.fraction)[1]
            assert over > limit_s or wider.prefill.units == 88

    def test_one_side_without_work_changes_nothing(self) -> None:
        controller = Dynamic(COST, NEXUS)
        before = controller.decision
        empty = Situation(Load(), Load.decoding(4, 4000), 0, 4, 0.1)
        assert controller.decide(lambda: empty, 5.0) is before
        assert controller.num_evaluations == 0

    def test_many_decoding_beside_one_long_prompt_divide(self) -> None:
        controller = Dynamic(COST, EAGER)
        assert controller.decision.layout.undivided
        decision = controller.decide(lambda: World(waiting=1, decoding=100).situation(), 0.0)
        assert not decision.layout.undivided
        assert "request-seconds" in decision.reason

    def test_a_long_queue_does_not(self) -> None:
        controller = Dynamic(COST, EAGER)
        decision = controller.decide(lambda: World(waiting=300, decoding=4).situation(), 0.0)
        assert decision.layout.undivided

    def test_a_target_holds_undivided_steps_to_what_they_have_time_for(self) -> None:
        world = World(waiting=300).situation()
        mixed_s = COST.undivided(world.prefill, world.decode)
        for part, whole in ((1.2, True), (0.8, False), (0.4, False)):
            controller = Dynamic(COST, replace(EAGER, tbt_target_s=mixed_s * part))
            decision = controller.decide(lambda: world, 0.0)
            assert decision.layout.undivided
            assert (decision.chunk is None) is whole
            assert "a token allowed" in decision.reason
            held = world.prefill.first(decision.chunk or world.prefill.tokens)
            assert COST.undivided(held, world.decode) <= mixed_s * part

    def test_of_what_keeps_a_target_the_least_loss_is_chosen(self) -> None:
        """Many decoding beside one prompt: a division, if its cut keeps the target too."""
        world = World(waiting=1, decoding=100).situation()
        alone_s = COST.alone(world.decode, Phase.DECODE).seconds
        target_s = 3 * alone_s
        controller = Dynamic(COST, replace(EAGER, tbt_target_s=target_s))
        decision = controller.decide(lambda: world, 0.0)
        assert not decision.layout.undivided
        assert decision.forecast is not None
        assert decision.forecast.decode_s <= target_s

    def test_a_target_that_nothing_keeps_is_not_asked_for(self) -> None:
        """Then twice what decoding takes alone is: no step is made of crumbs."""
        world = World(waiting=4).situation()
        alone_s = COST.alone(world.decode, Phase.DECODE).seconds
        controller = Dynamic(COST, replace(EAGER, tbt_target_s=1e-9))
        decision = controller.decide(lambda: world, 0.0)
        held = world.prefill.first(decision.chunk or world.prefill.tokens)
        assert COST.undivided(held, world.decode) <= 2 * alone_s
        assert decision.chunk is not None

    def test_the_first_step_of_both_is_held_to_its_time(self) -> None:
        config = ControllerConfig(tbt_target_s=0.02, interval_s=10.0)
        controller, world = Dynamic(COST, config), World(waiting=3, decoding=8).situation()
        prompts = replace(world, decode=Load(), decoding=0)
        assert controller.decide(lambda: prompts, 0.0).chunk is None
        assert controller.decide(lambda: world, 0.01).chunk is not None

    def test_chunks_follow_the_situation_while_the_layout_dwells(self) -> None:
        config = replace(EAGER, tbt_target_s=0.02, dwell_s=1e9)
        controller, crowd = Dynamic(COST, config), World(waiting=30, decoding=4)
        controller._changed_s = 0.0
        chunks = []
        for at, crowd.decoding in enumerate((4, 40, 90)):
            chunks.append(controller.decide(crowd.situation, float(at)).chunk)
        assert controller.num_changes == 0
        assert len(set(chunks)) > 1

    def test_measurements_change_its_mind(self) -> None:
        """A mixed step that takes far longer than predicted is not chosen for long."""
        controller = Dynamic(COST, EAGER)
        world = World(waiting=8, decoding=8, prompt=256).situation()
        assert controller.decide(lambda: world, 0.0).layout.undivided
        for _ in range(100):
            controller.observe(None, 0.01, 0.05)
        assert not controller.decide(lambda: world, 1.0).layout.undivided
        assert controller.corrections[None].errors is not None

    def test_a_slow_minute_is_not_held_for_ever_against_what_it_fell_on(self) -> None:
        """Mixed steps that once took three times as long are not made; still they are forgiven."""
        controller = Dynamic(COST, ControllerConfig())
        world = World(waiting=30, decoding=4).situation()
        assert controller.decide(lambda: world, 0.0).layout.undivided
        for _ in range(40):
            controller.observe(None, 0.01, 0.03)
        assert controller.corrections[None].ratio > 2
        assert not controller.decide(lambda: world, 5.0).layout.undivided
        for tick in range(250):
            for phase in Phase:
                controller.observe(phase, 0.01, 0.0105)
            controller.decide(lambda: world, 5.1 + tick / 10)
        assert controller.decision.layout.undivided
        assert controller.corrections[None].ratio < 1.2

    def test_one_disturbed_step_changes_little(self) -> None:
        controller = Dynamic(COST, EAGER)
        controller.observe(None, 0.01, 5.0)
        assert controller.corrections[None].ratio <= 1.1

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 10_000), st.sampled_from([NEXUS, EAGER]), st.integers(1, 40))
    def test_steady_noise_moves_the_layout_rarely(self, seed, config, waiting) -> None:
        """Sizes that jump by 3 % at every step: the buffer swallows nearly all of it."""
        controller, source = Dynamic(COST, config), random.Random(seed)
        world = World(waiting=waiting)
        for step in range(400):
            controller.decide(lambda: world.situation(source, 0.03), step * 0.02)
        assert controller.num_changes <= 4

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 10_000), st.floats(0.1, 1.0))
    def test_never_more_than_one_change_in_a_dwell(self, seed, noise) -> None:
        controller = Dynamic(COST, ControllerConfig())
        source, changed = random.Random(seed), []
        for step in range(1000):
            before, now = controller.num_changes, step * 0.02
            world = World(waiting=source.randint(1, 50), kv_usage=source.random())
            controller.decide(lambda: world.situation(source, noise), now)  # noqa: B023
            if controller.num_changes > before:
                changed.append(now)
        assert all(b - a >= 1.0 for a, b in itertools.pairwise(changed))

    def test_the_first_search_is_far_and_the_next_are_near(self) -> None:
        controller, source = Dynamic(COST, EAGER), random.Random(1)
        controller.decide(lambda: World().situation(), 0.0)
        before = controller.num_evaluations
        for step in range(1, 101):
            controller.decide(lambda: World().situation(source, 0.02), float(step))
        assert (controller.num_evaluations - before) / 100 <= 8

    def test_a_device_of_one_unit(self) -> None:
        single = cost_model("generic-cpu", "float32")
        single.device = single.device.sliced(1)
        controller = Dynamic(single)
        assert controller.decide(lambda: World().situation(), 0.0).layout.undivided
        assert controller.layouts == (layouts.undivided(single.device),)
        with pytest.raises(InfeasibleError, match="cannot be divided"):
            Dynamic(single, NEXUS)

    def test_two_cores_have_one_division(self) -> None:
        pair = cost_model("generic-cpu", "float32")
        pair.device = pair.device.sliced(2)
        controller = Dynamic(pair, NEXUS)
        assert [str(layout) for layout in controller.layouts] == ["1 | 1"]
        assert str(controller.decide(lambda: World().situation(), 0.0).layout) == "1 | 1"


@pytest.mark.parametrize(
    "wrong", [{"tbt_target_s": 0.0}, {"margin": 1.0}, {"dwell_s": -1.0}, {"interval_s": -1.0}]
)
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        ControllerConfig(**wrong)  # type: ignore[arg-type]
