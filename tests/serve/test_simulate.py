"""The simulator: closed forms, conservation, determinism, and the signs of the paper."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from toolkit.cli import main
from toolkit.errors import FormatError, InfeasibleError, UsageError
from toolkit.hardware import find_cluster
from toolkit.serve.bench.load import Arrival
from toolkit.serve.bench.report import Promise
from toolkit.serve.bench.sample import Sample
from toolkit.serve.clock import VirtualClock
from toolkit.serve.engine import Engine
from toolkit.serve.executor.simulated import SimulatedExecutor
from toolkit.serve.policy import ShortestPromptFirst
from toolkit.serve.scheduler import Scheduler
from toolkit.serve.simulate import report, systems, workload
from toolkit.serve.simulate.drive import drive
from toolkit.serve.simulate.systems import SYSTEMS, Setup
from toolkit.serve.split.cost_model import CostModel, StepOverhead
from toolkit.serve.split.sharded import sharded
from toolkit.serve.split.work import Load

sys.path.append(str(Path(__file__).parent))
from split_cases import cost_model

COST = cost_model()
SETUP = Setup(COST, max_context=16_000)


def simulated(
    name: str, arrivals: tuple[Arrival, ...], setup: Setup = SETUP
) -> tuple[list[Sample], Engine]:
    clock = VirtualClock()
    engine = systems.find(name).build(setup, clock)
    samples = drive(engine, clock, arrivals)
    engine.scheduler.check_integrity()
    assert engine.scheduler.pool.num_used == 0
    return samples, engine


def mean_ttft_s(samples: list[Sample]) -> float:
    return statistics.fmean(sample.ttft_s for sample in samples)


def mean_e2e_s(samples: list[Sample]) -> float:
    return statistics.fmean(sample.e2e_s for sample in samples)


def rate(samples: list[Sample]) -> float:
    """Output tokens a second."""
    return sum(sample.output_tokens for sample in samples) / max(one.end_s for one in samples)


def mean_tbt_s(samples: list[Sample]) -> float:
    return statistics.fmean(gap for sample in samples for gap in sample.gaps_s)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_serves_everything_twice_alike(name: str) -> None:
    arrivals = workload.find("mixed").arrivals(2.0, 24, seed=3)
    noisy = replace(SETUP, noise=0.2, seed=5)
    samples, engine = simulated(name, arrivals, noisy)
    again, _ = simulated(name, arrivals, noisy)
    assert samples == again
    for arrival, sample in zip(arrivals, samples, strict=True):
        assert sample.output_tokens == arrival.output_tokens
        assert sample.arrival is arrival
        assert list(sample.piece_s) == sorted(sample.piece_s)
        assert sample.ttft_s > 0
    found = report.summary(samples, engine, Promise())
    assert found["source"] == "simulated"
    assert found["output_tokens"] == sum(arrival.output_tokens for arrival in arrivals)
    assert {span.source for span in engine.timeline().spans} == {"simulated"}
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "mlfq"])
def test_without_preemption_every_token_is_computed_once(name: str) -> None:
    arrivals = workload.find("sharegpt").arrivals(4.0, 30, seed=1)
    _, engine = simulated(name, arrivals)
    assert engine.scheduler.num_preemptions == 0
    executor = engine.executor
    assert isinstance(executor, SimulatedExecutor)
    # The last token of each is drawn and not computed.
    assert executor.num_computed == sum(a.prompt_tokens + a.output_tokens - 1 for a in arrivals)


def test_littles_law() -> None:
    """Requests in the system, on average over time, are the rate times the mean time in it."""
    arrivals = workload.find("sharegpt").arrivals(6.0, 300, seed=2)
    samples, _ = simulated("chunked", arrivals)
    span_s = max(sample.end_s for sample in samples)
    events = sorted(
        [(sample.sent_s, 1) for sample in samples] + [(sample.end_s, -1) for sample in samples]
    )
    area, inside, before = 0.0, 0, 0.0
    for at_s, change in events:
        area += inside * (at_s - before)
        inside, before = inside + change, at_s
    mean_s = statistics.fmean(sample.e2e_s for sample in samples)
    assert area / span_s == pytest.approx(len(samples) / span_s * mean_s)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_server_of_constant_service_is_m_d_1(load: float) -> None:
    """One request at a time, all alike: the mean wait is rho s / (2 (1 - rho))."""
    cost = cost_model()
    cost.overhead = StepOverhead(per_step_s=0.0, per_sequence_s=0.0)
    setup = Setup(cost, max_context=1000, max_batch=1, step_tokens=512)
    one = Arrival(0.0, 512, 1)
    service_s = simulated("chunked", (one,), setup)[0][0].e2e_s
    made = workload.find("sharegpt").arrivals(load / service_s, 4000, seed=7)
    arrivals = tuple(replace(one, at_s=arrival.at_s) for arrival in made)
    samples, _ = simulated("chunked", arrivals, setup)
    waited_s = statistics.fmean(sample.e2e_s for sample in samples) - service_s
    assert waited_s == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.2)


def test_more_load_is_never_better() -> None:
    ttfts = []
    for rate in (0.5, 1.0, 2.0, 4.0):
        arrivals = workload.find("long").arrivals(rate, 60, seed=4)
        ttfts.append(mean_ttft_s(simulated("chunked", arrivals)[0]))
    assert ttfts == sorted(ttfts)


class TestPaper:
    """Signs of Nexus's ablation (arXiv 2507.06608 v5, section 6.4), mixed lengths on an L20."""

    @pytest.fixture(scope="class")
    def runs(self) -> dict[str, list[Sample]]:
        arrivals = workload.find("mixed").arrivals(2.2, 100, seed=0)
        names = ("chunked", "chunked-spf", "split-fcfs", "split-spf", "auto")
        return {name: simulated(name, arrivals)[0] for name in names}

    def test_dividing_lowers_tbt_and_raises_ttft(self, runs) -> None:
        assert mean_tbt_s(runs["split-fcfs"]) < mean_tbt_s(runs["chunked"])
        assert mean_ttft_s(runs["split-fcfs"]) > mean_ttft_s(runs["chunked"])

    def test_shortest_prompt_first_lowers_ttft(self, runs) -> None:
        assert mean_ttft_s(runs["chunked-spf"]) < mean_ttft_s(runs["chunked"])
        assert mean_ttft_s(runs["split-spf"]) < mean_ttft_s(runs["split-fcfs"])

    def test_auto_is_not_worse_than_either_and_keeps_tokens_coming(self, runs) -> None:
        """Our own aim: against the undivided engine with the same policy, and the divided one."""
        mine = runs["auto"]
        for other in ("chunked-spf", "split-spf"):
            assert mean_e2e_s(mine) < 1.05 * mean_e2e_s(runs[other])
            assert rate(mine) > 0.95 * rate(runs[other])
        undivided = sorted(gap for sample in runs["chunked-spf"] for gap in sample.gaps_s)
        divided = sorted(gap for sample in mine for gap in sample.gaps_s)
        at = int(0.99 * len(undivided))
        assert undivided[at] > 3 * divided[at]


def test_the_timeline_says_how_the_device_was_laid_out_and_why() -> None:
    arrivals = workload.find("mixed").arrivals(2.0, 40, seed=0)
    _, engine = simulated("auto", arrivals)
    spans = [span for span in engine.timeline().spans if span.track == "layout"]
    assert len(spans) == engine.controller.num_changes + 1 > 1
    assert spans[0].name == "undivided"
    assert all(a.end_s == b.start_s for a, b in itertools.pairwise(spans))
    assert all("predicted" in span.detail["why"] for span in spans[1:])


def test_two_devices_pay_for_sending() -> None:
    arrivals = (Arrival(0.0, 4000, 50),)
    near, _ = simulated("two-devices", arrivals)
    alone, _ = simulated("chunked", arrivals)
    sent_s = 4000 * COST.model.kv_bytes_per_token / COST.device.host_bandwidth
    assert near[0].ttft_s - alone[0].ttft_s == pytest.approx(sent_s, rel=0.01)


def test_noise_leaves_the_median_and_is_learnt_as_such() -> None:
    arrivals = workload.find("mixed").arrivals(1.5, 60, seed=6)
    _, engine = simulated("split-spf", arrivals, replace(SETUP, noise=0.1))
    ratios = [each.ratio for each in engine.controller.corrections.values() if each.num_observed]
    assert all(0.8 < ratio < 1.3 for ratio in ratios)


class TestWorkloads:
    @pytest.mark.parametrize(
        ("name", "prompt", "output"),
        [("long", (5905, 5461, 9292), (180, 159, 339)),
         ("arxiv", (3832, 3575, 6460), (200, 181, 357)),
         ("sharegpt", (496, 432, 970), (97, 37, 383))],
    )  # fmt: skip
    def test_lengths_are_the_papers(self, name, prompt, output) -> None:
        """Nexus, table 1: mean, median and 95th percentile."""
        made = workload.find(name).arrivals(1.0, 20_000, seed=0)
        for (mean, p50, p95), values in (
            (prompt, sorted(arrival.prompt_tokens for arrival in made)),
            (output, sorted(arrival.output_tokens for arrival in made)),
        ):
            assert statistics.fmean(values) == pytest.approx(mean, rel=0.15)
            assert values[10_000] == pytest.approx(p50, rel=0.05)
            assert values[19_000] == pytest.approx(p95, rel=0.05)

    @pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
    def test_gaps_have_the_rate_and_the_variation(self, cv: float) -> None:
        made = workload.find("sharegpt").arrivals(5.0, 20_000, seed=1, cv=cv)
        gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(made)]
        assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.1)
        assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.1)

    def test_rates_are_compared_on_the_same_requests(self) -> None:
        slow, fast = (workload.find("mixed").arrivals(rate, 50, seed=1) for rate in (1.0, 2.0))
        for one, two in zip(slow, fast, strict=True):
            assert (one.prompt_tokens, one.output_tokens) == (two.prompt_tokens, two.output_tokens)
            assert one.at_s == pytest.approx(2 * two.at_s)
        assert {a.at_s for a in workload.find("long").arrivals(math.inf, 5, seed=0)} == {0.0}

    @pytest.mark.parametrize("wrong", [(0.0, 5, 1.0), (1.0, 0, 1.0), (1.0, 5, 0.0)])
    def test_nonsense_is_refused(self, wrong) -> None:
        with pytest.raises(UsageError):
            workload.find("long").arrivals(wrong[0], wrong[1], seed=0, cv=wrong[2])


def test_wrong_names_bring_the_nearest() -> None:
    with pytest.raises(UsageError, match="split-spf"):
        systems.find("split-spff")
    with pytest.raises(UsageError, match="sharegpt"):
        workload.find("share-gpt")


def test_a_model_too_large_for_the_device_says_so() -> None:
    huge = replace(COST.model, weight_bytes=2**40)
    with pytest.raises(InfeasibleError, match="leaves no KV"):
        _ = replace(SETUP, cost=cost_of(huge)).num_blocks


def cost_of(model):
    made = cost_model()
    made.model = model
    return made


class TestCommandLine:
    ARGUMENTS = ("serve", "simulate", "llama-tiny", "--device", "l4", "--workload", "sharegpt",
                 "--num", "12", "--rate", "20")  # fmt: skip

    def test_a_table_says_that_it_is_simulated(self) -> None:
        result = CliRunner().invoke(main.app, [*self.ARGUMENTS, "--system", "all", "--num", "3"])
        assert result.exit_code == 0, result.output
        assert "simulated" in result.output
        assert "two-devices" in result.output

    def test_json_and_timeline(self, tmp_path: Path) -> None:
        file = tmp_path / "run.json"
        arguments = [*self.ARGUMENTS, "--system", "auto", "--json", "--timeline", str(file)]
        result = CliRunner().invoke(main.app, arguments)
        assert result.exit_code == 0, result.output
        body = json.loads(result.stdout)
        assert body["source"] == "simulated"
        assert body["runs"][0]["system"] == "auto"
        assert body["runs"][0]["split"]["last_reason"]
        shown = CliRunner().invoke(main.app, ["timeline", "show", str(file)])
        assert shown.exit_code == 0, shown.output

    def test_a_trace_file(self, tmp_path: Path) -> None:
        file = tmp_path / "trace.jsonl"
        rows = [
            {"timestamp": 100 * at, "input_length": 50 + at, "output_length": 5} for at in range(9)
        ]
        file.write_text("\n".join(map(json.dumps, rows)))
        arguments = [*self.ARGUMENTS, "--trace", str(file), "--system", "chunked", "--json"]
        result = CliRunner().invoke(main.app, arguments)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["runs"][0]["num_served"] == 9

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--system", "chunkd"], "chunked"),
            (["--workload", "mixd"], "mixed"),
            (["--device", "l200"], "l20"),
            (["--rate", "0"], "rate"),
            (["--mixed-factor", "0.2"], "1 or more"),
            (["--tbt-target", "soon"], "duration"),
            (["--system", "all", "--timeline", "t.json"], "one run"),
        ],
    )
    def test_what_is_wrong_is_named(self, arguments: list[str], said: str) -> None:
        result = CliRunner().invoke(main.app, [*self.ARGUMENTS, *arguments])
        assert isinstance(result.exception, UsageError), result.output
        assert said in str(result.exception)

    def test_a_picture(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        file = tmp_path / "rates.png"
        arguments = [*self.ARGUMENTS, "--rate", "10,20", "--picture", str(file), "--num", "4"]
        result = CliRunner().invoke(main.app, arguments)
        assert result.exit_code == 0, result.output
        assert file.read_bytes().startswith(b"\x89PNG")


class TestLengthsOfAFile:
    def test_they_are_drawn_in_pairs(self, tmp_path: Path) -> None:
        file = tmp_path / "lengths.csv"
        file.write_text("num_prefill_tokens,num_decode_tokens\n100,1\n200,2\n300,0\n")
        made = workload.find(str(file)).arrivals(1.0, 300, seed=0)
        assert {(a.prompt_tokens, a.output_tokens) for a in made} == {(100, 1), (200, 2), (300, 1)}

    @pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "ContextTokens,GeneratedTokens\n",
                                      "ContextTokens,GeneratedTokens\nx,2\n",
                                      "ContextTokens,GeneratedTokens\n0,2\n"])  # fmt: skip
    def test_what_is_no_table_is_named(self, text: str, tmp_path: Path) -> None:
        file = tmp_path / "lengths.csv"
        file.write_text(text)
        with pytest.raises(FormatError, match=r"lengths\.csv"):
            workload.find(str(file))


def test_two_devices_that_share_a_model() -> None:
    part, exchange = sharded(COST.model, find_cluster("l20x2"))
    assert part.weight_bytes == COST.model.weight_bytes / 2
    alone = Setup(COST, max_context=1000)
    shared = replace(alone, cost=CostModel(part, COST.device, exchange=exchange))
    assert shared.num_blocks > 2 * alone.num_blocks
    load = Load.chunk(0, 2048, samples=1)
    ratio = COST.alone(load).seconds / shared.cost.alone(load).seconds
    assert 1.2 < ratio < 2.0
    assert sharded(COST.model, find_cluster("l20x1"))[1].seconds(load) == 0.0
    with pytest.raises(InfeasibleError, match="differ"):
        sharded(COST.model, find_cluster("l20x1+l4x1"))


def test_no_prompt_waits_longer_than_it_may() -> None:
    """Short prompts that are more than can be served starve a long one, up to the limit."""
    shorts = workload.find("sharegpt").arrivals(60.0, 500, seed=1)
    arrivals = (Arrival(0.5, 9000, 2), *(one for one in shorts if one.at_s > 0.5))
    first = {}
    for limit_s in (None, 4.0):
        clock = VirtualClock()
        limits = SETUP.scheduler("spf")
        policy = ShortestPromptFirst(gamma=0.0, max_wait_s=limit_s)
        scheduler = Scheduler(limits.config, limits.pool, policy, policy)
        executor = SETUP.executor(clock)
        samples = drive(Engine(scheduler, executor, clock), clock, arrivals)
        chunks_s = 5 * COST.alone(Load.chunk(7000, 9000)).seconds
        first[limit_s] = samples[0].ttft_s - chunks_s
    assert first[None] > 8.0
    assert first[4.0] < 5.0
    with pytest.raises(UsageError, match="over at once"):
        ShortestPromptFirst(max_wait_s=0.0)
