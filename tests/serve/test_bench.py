"""Load and batch files against a server, as the command line drives them."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from toolkit.cli import serve as cli
from toolkit.errors import FormatError, ToolkitError, UsageError
from toolkit.serve import jobs
from toolkit.serve.bench import client, load, report


def arrival(at_s: float = 0.0) -> load.Arrival:
    return load.Arrival(at_s, 10, 3)


def test_a_sweep_is_measured_drawn_and_told(served: Any, tmp_path: Path) -> None:
    picture = tmp_path / "load.png"
    arguments = [
        "bench", f"{served.url}/v1", "--rate", "20,inf", "--num", "6", "--prompt", "20-40",
        "--output", "2-8", "--slo-ttft", "1h", "--slo-tpot", "1h", "--picture", str(picture),
        "--json",
    ]  # fmt: skip
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [run["rate"] for run in told["runs"]] == [20, None]
    for run in told["runs"]:
        assert (run["num_served"], run["num_good"], run["errors"]) == (6, 6, {})
        assert 12 <= run["output_tokens"] <= 48
        # Lengths are those asked for, as far as characters tell tokens.
        assert 6 * 10 <= run["prompt_tokens"] <= 6 * 80
        assert run["ttft_s"]["p50"] <= run["ttft_s"]["p99"] <= run["e2e_s"]["p99"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert CliRunner().invoke(cli.app, [*arguments[:-1], "--chat"]).exit_code == 0


def test_failures_count(start: Any) -> None:
    served = start(max_batch=1, max_queue=1)
    target = client.Target(f"{served.url}/v1", "tiny")
    arrivals = [arrival() for _ in range(8)]
    served.executor.gate.clear()
    timer = asyncio.run(_run_and_open(served, target, arrivals))
    figures = report.summary(timer, report.Promise())
    assert figures["errors"]["HTTP 429"] == 8 - figures["num_served"]
    assert figures["num_good"] == figures["num_served"] < 8


async def _run_and_open(served: Any, target: client.Target, arrivals: Any) -> list[client.Sample]:
    loop = asyncio.get_running_loop()
    loop.call_later(1.0, served.executor.gate.set)
    return await client.run(target, arrivals, ["a b c"] * len(arrivals))


def test_figures_of_known_times() -> None:
    def sample(ttft_s: float, gap_s: float, error: str | None = None) -> client.Sample:
        pieces = () if error else tuple(1 + ttft_s + at * gap_s for at in range(3))
        return client.Sample(arrival(1), 1.0, 1 + ttft_s + 2 * gap_s, pieces, 10, 3, error)

    samples = [sample(0.1, 0.01), sample(0.3, 0.01), sample(0.1, 0.5), sample(0, 0, "HTTP 429")]
    figures = report.summary(samples, report.Promise(ttft_s=0.2, tpot_s=0.1))
    assert (figures["num_served"], figures["num_good"]) == (3, 1)
    assert figures["ttft_s"]["p50"] == pytest.approx(0.1)
    assert figures["tbt_s"]["p99"] == pytest.approx(0.5)
    assert figures["output_tokens_per_s"] == pytest.approx(9 / 2.1)


def test_arrivals_are_poisson_and_repeat_themselves() -> None:
    lengths = load.Lengths(50, 300), load.Lengths(10, 20)
    arrivals = load.poisson(4.0, 2000, *lengths, seed=3)
    assert arrivals == load.poisson(4.0, 2000, *lengths, seed=3)
    gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(0.25, rel=0.1)
    assert spread == pytest.approx(mean, rel=0.1)
    assert {arrival.prompt_tokens for arrival in arrivals} == set(range(50, 301))


def test_traces(tmp_path: Path) -> None:
    mooncake = tmp_path / "a.jsonl"
    rows = [(1000, 20, 5), (3000, 9000, 5), (5000, 30, 0)]
    mooncake.write_text("".join(
        json.dumps({"timestamp": at, "input_length": i, "output_length": o}) + "\n"
        for at, i, o in rows
    ))  # fmt: skip
    found = load.trace(mooncake, num=None, speed=2.0, max_tokens=1000)
    assert found == (load.Arrival(0.0, 20, 5), load.Arrival(2.0, 30, 1))
    azure = tmp_path / "a.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,48,10\n"
        "2023-11-16 18:17:04.4799600,31,8\n"
    )
    assert load.trace(azure, num=None, speed=1.0, max_tokens=None)[1] == load.Arrival(0.5, 31, 8)
    with pytest.raises(FormatError, match="no trace"):
        load.trace(Path(__file__), num=1, speed=1.0, max_tokens=None)
    with pytest.raises(UsageError, match="at most 3"):
        load.trace(mooncake, num=1, speed=1.0, max_tokens=3)


def test_an_absent_server_is_named() -> None:
    with pytest.raises(ToolkitError, match="lists no model"):
        client.first_model("http://127.0.0.1:9/v1", None)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_jobs(path: Path, num: int = 6) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    asked = [("/v1/completions", {"prompt": "a b"}), ("/v1/chat/completions", chat)]
    rows = []
    for at in range(num):
        url, body = asked[at % 2]
        row = {"custom_id": f"job {at}", "method": "POST", "url": url}
        rows.append(row | {"body": {"model": "tiny", "max_tokens": 3, **body}})
    rows.append(rows[0] | {"custom_id": "wrong", "body": {"model": "other", "prompt": "a"}})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_batch_killed_is_taken_up_again(served: Any, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_jobs(source)
    arguments = ["batch", served.url, str(source), "-o", str(output), "--json"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {
        "output": str(output), "num_jobs": 7, "num_before": 0, "num_now": 7, "num_failed": 1,
    }  # fmt: skip
    rows = lines_of(output)
    assert {row["custom_id"] for row in rows} == {f"job {at}" for at in range(6)} | {"wrong"}
    for row in rows:
        status = row["response"]["status_code"]
        assert (row["error"] is None) == (status == 200) == (row["custom_id"] != "wrong")
    # As a kill leaves it: two lines whole, the third torn.
    whole = output.read_text().splitlines(keepends=True)
    output.write_text("".join(whole[:2]) + whole[2][:40])
    again = json.loads(CliRunner().invoke(cli.app, arguments).stdout)
    assert (again["num_before"], again["num_now"]) == (2, 5)
    assert lines_of(output)[:2] == rows[:2]
    assert len({row["custom_id"] for row in lines_of(output)}) == len(lines_of(output)) == 7
    finished = json.loads(CliRunner().invoke(cli.app, arguments).stdout)
    assert (finished["num_before"], finished["num_now"], finished["num_failed"]) == (7, 0, 1)


def test_a_batch_waits_where_the_queue_is_full(start: Any, tmp_path: Path) -> None:
    served = start(max_batch=1, max_queue=1)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_jobs(source, 4)

    async def run() -> jobs.Tally:
        async with httpx.AsyncClient(base_url=served.url) as http:
            return await jobs.run(http, jobs.read(source), output, concurrency=5)

    assert asyncio.run(run()) == jobs.Tally(0, 5, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is no request"),
        ('{"custom_id": "a", "url": "/v1/images", "body": {}}', "/v1/images"),
        ('{"custom_id": "a", "url": "/v1/completions", "body": {"stream": true}}', "stream"),
        ('{"custom_id": "a", "url": "/v1/completions", "body": {}}\n' * 2, "earlier line"),
    ],
)
def test_bad_batch_files_are_refused(tmp_path: Path, line: str, message: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(line)
    with pytest.raises(FormatError, match=message):
        jobs.read(source)
