"""Programs in the simulator: closed loops, prefixes shared by the real cache, files, and bounds."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from toolkit.cli import main
from toolkit.errors import FormatError, UsageError
from toolkit.serve.kv import prefix
from toolkit.serve.policy import QueueConfig
from toolkit.serve.simulate import agents, program_systems
from toolkit.serve.simulate.agents import AgentProgram, Call
from toolkit.serve.simulate.drive_programs import Finished
from toolkit.serve.simulate.program_report import simulate, sustained
from toolkit.serve.simulate.program_systems import PROGRAM_SYSTEMS
from toolkit.serve.simulate.systems import Setup
from toolkit.serve.simulate.text import Text

sys.path.append(str(Path(__file__).parent))
from split_cases import cost_model

COST = cost_model()
# Little memory, so that programs wait for one another.
SETUP = Setup(
    COST, max_context=24_000, max_batch=16, kv_bytes=24_000 * COST.model.kv_bytes_per_token
)


@pytest.mark.parametrize("name", PROGRAM_SYSTEMS)
@pytest.mark.parametrize("workload", ["sharegpt", "lats"])
def test_every_program_is_served_the_same_by_leaps_and_steps(name: str, workload: str) -> None:
    made = list(agents.programs(workload, 2.0, 6 if workload == "sharegpt" else 1, seed=1))
    system = program_systems.find(name)
    setup = dataclasses.replace(SETUP, max_batch=3)
    figures, done = simulate(system, setup, made)
    again, same = simulate(system, setup, made, stepwise=True)
    assert figures == again
    assert done == same
    assert sorted(one.num_calls for one in done) == sorted(len(one.calls) for one in made)
    assert figures["num_calls"] == sum(len(one.calls) for one in made)
    assert all(one.latency_s > 0 for one in done)
    assert figures["source"] == "simulated"
    assert json.loads(json.dumps(figures)) == figures
    assert (figures["prefix_hit"] > 0.3) == system.prefix_cache


def test_a_call_waits_for_those_before_it_and_its_tool() -> None:
    """A fork and a join: the way is the longer branch, and tools are not its latency."""
    calls = (
        Call((), None, 64, 10, 0.0),
        Call((0,), 0, 16, 10, 2.0),
        Call((0,), 0, 16, 200, 1.0),
        Call((1, 2), 2, 16, 10, 3.0),
    )
    (one,) = simulate(program_systems.find("atlas"), SETUP, [AgentProgram(5.0, "made", 32, calls)])[
        1
    ]
    assert one.at_s == 5.0
    assert one.tools_s == 1.0 + 3.0
    assert one.num_tokens == 230
    step_s = one.latency_s / 220
    assert 0.005 < step_s < 0.05


def test_what_is_shared_is_the_context_and_not_what_siblings_say() -> None:
    """Two calls that go on from one: its blocks are found, each other's answers are not."""
    calls = (
        Call((), None, 160, 32, 0.0),
        Call((0,), 0, 16, 64, 0.5),
        Call((0,), 0, 16, 64, 0.5),
    )
    setup = dataclasses.replace(SETUP, block_size=16)
    found, _ = simulate(program_systems.find("plas"), setup, [AgentProgram(0.0, "m", 0, calls)])
    # 160 + 32 tokens are shared. The last drawn was never computed: of its block the first to go on
    # makes one that is full, which the second waits for.
    assert found["prefix_hit"] == pytest.approx((176 + 192) / (160 + 2 * 208))


def test_kept_names_are_those_of_the_tokens() -> None:
    text = Text().plus(1, 20).plus(-3, 13).plus(1007, 9)
    tokens = [1] * 20 + [-3] * 13 + [1007] * 9
    assert list(text) == tokens
    for start, stop in itertools.combinations(range(0, 43, 3), 2):
        assert text[start:stop] == tokens[start:stop]
    assert prefix.name(prefix.root(), text[0:16]) == prefix.name(prefix.root(), tokens[:16])
    with pytest.raises(IndexError):
        text[42]


class TestPaper:
    """Autellix (arXiv 2502.13965): the order of systems on its mix, on a loaded engine."""

    @pytest.fixture(scope="class")
    def runs(self) -> dict[str, list[Finished]]:
        made = list(agents.programs("agents", 6.0, 20, seed=2))
        setup = dataclasses.replace(SETUP, max_batch=8)
        return {
            name: simulate(program_systems.find(name), setup, made)[1] for name in PROGRAM_SYSTEMS
        }

    @staticmethod
    def mean_s(done: list[Finished]) -> float:
        return statistics.fmean(one.per_token_s for one in done)

    def test_programs_first_is_better_than_calls_first(self, runs) -> None:
        assert self.mean_s(runs["fcfs-cached"]) < self.mean_s(runs["fcfs"])
        for name in ("plas", "atlas"):
            assert self.mean_s(runs[name]) < self.mean_s(runs["fcfs-cached"])

    def test_knowing_the_future_is_better_still(self, runs) -> None:
        assert self.mean_s(runs["srpt"]) < 1.05 * min(
            self.mean_s(runs[name]) for name in ("plas", "atlas", "mlfq", "fcfs-cached")
        )


class TestWorkloads:
    @pytest.mark.parametrize(
        ("name", "calls", "prompt", "output"),
        [("sharegpt", 6.66, None, 277), ("bfcl", 10.75, 735, 34.14), ("lats", 159.7, 467.2, 72.6)],
    )
    def test_they_have_the_papers_means(self, name, calls, prompt, output) -> None:
        made = list(agents.programs(name, 1.0, 3000 if name != "lats" else 300, seed=0))
        assert statistics.fmean(len(one.calls) for one in made) == pytest.approx(calls, rel=0.08)
        outputs = [call.output_tokens for one in made for call in one.calls]
        assert statistics.fmean(outputs) == pytest.approx(output, rel=0.05)
        prompts = [tokens for one in made for tokens in one.prompts()]
        if prompt is not None:
            assert statistics.fmean(prompts) == pytest.approx(prompt, rel=0.1)
        else:
            new = [call.new_tokens for one in made for call in one.calls]
            assert statistics.fmean(new) == pytest.approx(256, rel=0.05)

    def test_rates_are_compared_on_the_same_programs(self) -> None:
        slow, fast = (list(agents.programs("agents", rate, 9, seed=3)) for rate in (1.0, 2.0))
        assert [one.calls for one in slow] == [one.calls for one in fast]
        assert [one.at_s for one in slow] == pytest.approx([2 * one.at_s for one in fast])
        assert {one.at_s for one in agents.programs("bfcl", math.inf, 3, seed=0)} == {0.0}

    def test_a_file_holds_them_whole(self, tmp_path: Path) -> None:
        made = tuple(agents.programs("agents", 1.0, 4, seed=0))
        file = tmp_path / "programs.json"
        agents.write(made, file)
        assert agents.read(file) == made
        body = json.loads(file.read_text())
        body["body"][0]["calls"][0][3] += 1
        file.write_text(json.dumps(body))
        with pytest.raises(FormatError):
            agents.read(file)

    @pytest.mark.parametrize(
        "calls",
        [
            [[[], None, 5, 5, 0.0], [[1], 0, 5, 5, 0.0]],
            [[[], None, 5, 5, 0.0], [[], 0, 5, 5, 0.0]],
            [[[], None, 0, 5, 0.0]],
            [[[], None, 5]],
            [],
        ],
    )
    def test_what_is_no_program_is_named(self, calls, tmp_path: Path) -> None:
        from toolkit import record

        body = [{"at_s": 0.0, "kind": "k", "system_tokens": 0, "calls": calls}]
        file = tmp_path / "wrong.json"
        record.write(file, kind=agents.FILE_KIND, version=agents.FILE_VERSION, body=body)
        with pytest.raises(FormatError, match=r"wrong\.json"):
            agents.read(file)

    @pytest.mark.parametrize("wrong", [("bfcl", 0.0, 1), ("bfcl", 1.0, 0), ("bfc", 1.0, 1)])
    def test_nonsense_is_refused(self, wrong) -> None:
        with pytest.raises(UsageError):
            list(agents.programs(*wrong, seed=0))


def test_a_rate_is_found_between_two() -> None:
    assert sustained([(1.0, 0.1), (2.0, 0.3), (3.0, 0.2)], 0.25) == pytest.approx(1.75)
    assert sustained([(1.0, 0.4)], 0.25) is None
    assert sustained([(1.0, 0.1)], 0.25) == 1.0


def test_starving_programs_are_promoted() -> None:
    made = list(agents.programs("agents", 3.0, 12, seed=4))
    queues = QueueConfig(beta=1.0, max_wait_s=2.0)
    setup = dataclasses.replace(SETUP, max_batch=4)
    figures, _ = simulate(program_systems.find("plas"), setup, made, queues=queues)
    assert figures["num_promotions"] > 0


class TestCommandLine:
    ARGUMENTS = ("serve", "simulate", "llama-tiny", "--device", "l4", "--kv-memory", "32MiB")

    def test_a_table_and_a_file_of_programs(self, tmp_path: Path) -> None:
        file = tmp_path / "programs.json"
        made = [*self.ARGUMENTS, "--programs", "bfcl", "--num", "3", "--rate", "2"]
        result = CliRunner().invoke(main.app, [*made, "--save-programs", str(file)])
        assert result.exit_code == 0, result.output
        assert "simulated" in result.output
        assert "atlas" in result.output
        again = [*self.ARGUMENTS, "--programs", str(file), "--system", "plas", "--json"]
        result = CliRunner().invoke(main.app, again)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["runs"][0]["num_programs"] == 3

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--programs", "bfc"], "bfcl"),
            (["--programs", "bfcl", "--system", "pls"], "plas"),
            (["--programs", "bfcl", "--report", "x.html"], "report"),
            (["--save-programs", "x.json"], "--programs"),
            (["--programs", "nowhere.json"], "nowhere"),
        ],
    )
    def test_what_is_wrong_is_named(self, arguments: list[str], said: str) -> None:
        result = CliRunner().invoke(main.app, [*self.ARGUMENTS, "--num", "2", *arguments])
        assert isinstance(result.exception, UsageError), result.output
        assert said in str(result.exception)
