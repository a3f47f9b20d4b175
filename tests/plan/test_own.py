"""A program written with the three primitives, as a plan that ranks run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.errors import UsageError
from toolkit.hardware import find_cluster
from toolkit.models import factory
from toolkit.plan import check, io, own, planner, subject, verify

pytestmark = pytest.mark.usefixtures("toys")  # beside them lies own_plans


@pytest.fixture(scope="module")
def traced():
    return subject.load("gpt-tiny", batch=8, tokens=16)


def write(name: str) -> own.Write:
    return factory.imported(f"own_plans:{name}", "function")


def sizes(plan) -> dict[str, int]:
    return {axis.name: axis.size for axis in plan.mesh if axis.size > 1}


@pytest.mark.parametrize(
    ("name", "mesh", "said"),
    [
        ("samples", {"tensor": 2}, ("head:linear", "tensor")),
        ("megatron", {"tensor": 2}, ("blocks.*.ffn.down:linear", "tensor")),
        ("both", {"tensor": 2}, ("blocks.*.ffn.up:linear", "tensor")),
        ("co_sharded", {}, ("blocks.*.ffn.up:linear", None)),
        ("two_stages", {"pipeline": 2}, None),
        ("grid", {"context": 2, "tensor": 2}, ("blocks.*.ffn.up:linear", "tensor")),
    ],
)
def test_a_program_becomes_a_plan(traced, name, mesh, said) -> None:
    plan = own.plan(write(name), traced, find_cluster("cpux4"), microbatches=2)
    check.check(plan)
    assert sizes(plan) == mesh
    if said:
        assert said in {(split.ops, split.axis) for split in plan.splits}
    else:
        assert not plan.splits
        assert [stage.begins_at for stage in plan.stages] == [None, "blocks.2"]
        assert plan.stages[1].blocks == ("blocks.2", "blocks.3")
    assert {split.parts for split in plan.splits if split.axis is None} <= {4}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("backwards", "no plan says how .* lies on its devices"),
        ("back_and_forth", "stage 2, which begins with .*blocks.3.* is on devices 0"),
        ("ordered", "a plan does not say that blocks.0.* on device 0 runs before blocks.3"),
    ],
)
def test_what_no_plan_says_is_refused(traced, name, message) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        own.plan(write(name), traced, find_cluster("cpux2"))
    assert caught.value.remedy


def test_programs_run_on_ranks_as_one_device_would(traced, tmp_path: Path) -> None:
    paths = []
    for name in ("both", "two_stages"):
        plan = planner.make_own(traced, find_cluster("cpux2"), write(name), microbatches=2)
        paths.append(tmp_path / f"{name}.json")
        io.save(plan, paths[-1])
    for report in verify.verify(paths):
        assert report.holds, report
        assert report.traffic


PAGE = Path(__file__).parents[2] / "docs" / "howto" / "write-a-plan.md"


def test_the_how_tos_commands_run(tmp_path: Path) -> None:
    """Made and verified as the page says; the training is the recipe's own test."""
    text = PAGE.read_text()
    (code,) = re.findall(r"```py\n# mine.py\n(.*?)```", text, re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    (lines,) = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    environment = {**os.environ, "PYTHONPATH": str(PAGE.parents[2])}
    for line in lines.splitlines()[:2]:
        command = [sys.executable, "-m", *shlex.split(line), "--json"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
    assert json.loads(done.stdout)["holds"]
