from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from toolkit import record
from toolkit.errors import FormatError, InfeasibleError, ToolkitError, UsageError
from toolkit.hardware import find_cluster
from toolkit.plan import io, library, planner, subject


@pytest.mark.parametrize("strategy", library.STRATEGIES)
def test_a_plan_comes_back_as_it_was(strategy: str, tiny, tmp_path: Path) -> None:
    try:
        plan = planner.make(tiny, find_cluster("cpux4"), strategy)
    except InfeasibleError as error:
        pytest.skip(str(error))
    io.save(plan, tmp_path / "plan.json")
    assert io.load(tmp_path / "plan.json") == plan


def altered(plan, change) -> dict:
    body = json.loads(json.dumps(io.to_body(plan)))
    change(body)
    return body


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda body: body.update(colour="red"), "colour"),
        (lambda body: body["mesh"][0].update(speed=1), "speed"),
        (lambda body: body["prediction"].update(step_time=1), "step_time"),
        (lambda body: body.pop("mesh"), "mesh"),
        (lambda body: body["mesh"][0].update(name="expert"), "mesh.0.name"),
        (lambda body: body.update(microbatches="two"), "microbatches"),
        (lambda body: body.update(order=["0X1"]), "0X1"),
        (lambda body: body.update(order=7), "order"),
        (lambda body: body["order"].append("1F0"), "rows of order"),
    ],
)
def test_a_wrong_key_or_value_is_named(change, named: str, tiny, two_ranks, tmp_path: Path) -> None:
    body = altered(planner.make(tiny, two_ranks, "dp"), change)
    path = tmp_path / "plan.json"
    record.write(path, kind=io.KIND, version=io.VERSION, body=body)
    with pytest.raises(FormatError, match=named):
        io.load(path)


def test_torn_edited_foreign_and_missing_files_are_refused(tiny, two_ranks, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    io.save(planner.make(tiny, two_ranks, "dp"), path)
    whole = path.read_text()
    for text, message in (
        (whole[:200], "corrupt"),
        (whole.replace('"gpt-tiny"', '"gpt-mini"'), "digest"),
        (whole.replace("toolkit/plan", "toolkit/graph"), "not a plan file"),
        (whole.replace('"version": 2', '"version": 9'), "version 9"),
    ):
        path.write_text(text)
        with pytest.raises(FormatError, match=message):
            io.load(path)
    with pytest.raises(UsageError, match="no such file"):
        io.load(tmp_path / "none.json")


def test_a_plan_of_another_graph_is_refused(tiny, two_ranks) -> None:
    plan = planner.make(tiny, two_ranks, "dp")
    other = replace(plan, provenance=replace(plan.provenance, graph_digest="0" * 64))
    subject.check_same(tiny, plan)
    with pytest.raises(ToolkitError, match="another graph"):
        subject.check_same(tiny, other)
