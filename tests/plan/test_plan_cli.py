from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from toolkit.cli.plan import app
from toolkit.errors import InfeasibleError, UsageError
from toolkit.plan import library
from toolkit.timeline import files

MAKE = ["make", "gpt-tiny", "--tokens", "32", "--cluster", "cpux2"]


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_make_show_simulate(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    at_once = tmp_path / "at_once.json"
    made = run(*MAKE, "--strategy", "1f1b", "--batch", 8, "-o", path, "--timeline", at_once)
    assert made.exit_code == 0, made.output
    assert "torchrun --nproc-per-node 2 recipes/train.py" in " ".join(made.output.split())
    shown = run("show", path)
    assert shown.exit_code == 0, shown.output
    assert "0F0 0F1 0B0 0F2" in shown.output
    assert "Predicted traffic" in shown.output
    body = json.loads(run("show", path, "--json").output)
    assert body["strategy"] == "1f1b"
    out = tmp_path / "timeline.json"
    facts = json.loads(run("simulate", path, "-o", out, "--json").output)
    assert facts["source"] == "predicted"
    assert facts["step_s"] == pytest.approx(body["prediction"]["step_s"])
    assert files.load(out).duration_s == pytest.approx(facts["step_s"])
    assert files.load(at_once) == files.load(out)


def test_auto_prints_what_it_considered(tmp_path: Path) -> None:
    made = run(*MAKE, "-o", tmp_path / "plan.json", "--json")
    facts = json.loads(made.output)
    others = {entry["description"]: entry["step_s"] for entry in facts["plan"]["considered"]}
    assert {facts["plan"]["strategy"], *others} == set(library.STRATEGIES)
    fastest = facts["plan"]["prediction"]["step_s"]
    assert all(fastest <= step_s for step_s in others.values() if step_s)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--strategy", "dpp"], UsageError, "did you mean 'dp'"),
        (["--dtype", "float31"], UsageError, "did you mean 'float32'"),
        (["--cluster", "cpux2x"], UsageError, "cpux2x"),
        (["--memory", "1 MiB", "--strategy", "dp"], InfeasibleError, "needs"),
        (["--strategy", "tp", "--cluster", "h100x8"], InfeasibleError, "does not divide 4"),
        (["--strategy", "1f1b", "--ranks", "4"], InfeasibleError, "cpux2 has 2"),
    ],
)
def test_errors(arguments: list[str], error: type, message: str, tmp_path: Path) -> None:
    result = run(*MAKE, *arguments, "-o", tmp_path / "plan.json")
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    assert not (tmp_path / "plan.json").exists()


def test_an_unknown_model_is_named(tmp_path: Path) -> None:
    result = run("make", "gpt-tini", "-o", tmp_path / "plan.json")
    assert isinstance(result.exception, UsageError)
    assert "gpt-tiny" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--all", "plan.json"], "brings its own plans"),
        ([], "no plan to verify"),
        (["plan.json", "--dtype", "float32", "--dtype", "float64"], "in one dtype"),
    ],
)
def test_verify_asks_for_plans_or_for_all_of_them(arguments: list[str], message: str) -> None:
    result = run("verify", *arguments)
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
