"""recipes/train.py end to end on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit import record
from toolkit.errors import ToolkitError, UsageError
from toolkit.plan import checkpoint, io, launch, planner, text
from toolkit.timeline import files

TRAIN = Path(__file__).parents[2] / "recipes" / "train.py"


def train(plan, folder: Path, steps: int, *options: str) -> dict:
    path, metrics = folder / "plan.json", folder / "metrics.json"
    io.save(plan, path)
    launch.run(
        [str(TRAIN), "--plan", str(path), "--steps", str(steps), "--json", str(metrics),
         "--checkpoint", str(folder / "checkpoints"), *options],
        plan.num_ranks,
    )  # fmt: skip
    return record.read(metrics, kind="training-metrics", version=1)["body"]


def test_three_steps_then_resumed_under_another_plan(tiny, two_ranks, tmp_path: Path) -> None:
    timeline = tmp_path / "timeline.json"
    first = train(
        planner.make(tiny, two_ranks, "1f1b"), tmp_path, 3,
        "--check-parity", "2", "--timeline", str(timeline),
    )  # fmt: skip
    assert len(first["losses"]) == 3
    assert first["losses"][-1] < first["losses"][0]
    assert [check["holds"] for check in first["parity"]] == [True, True]
    spans = files.load(timeline).spans
    assert {span.track for span in spans} == {"rank 0", "rank 1"}
    assert {span.source for span in spans} == {"measured"}
    resumed = train(planner.make(tiny, two_ranks, "fsdp"), tmp_path, 4, "--check-parity", "1")
    assert resumed["first_step"] == 3
    assert len(resumed["losses"]) == 1
    assert resumed["parity"][0]["holds"]
    found = checkpoint.latest(tmp_path / "checkpoints")
    assert found is not None
    assert found.name == "step-00000004"
    assert not list((tmp_path / "checkpoints").glob(".*.partial"))


@pytest.mark.slow
def test_every_plan_learns_the_same_and_resuming_changes_nothing(
    tiny, two_ranks, tmp_path: Path
) -> None:
    whole = {}
    for name in ("dp", "fsdp", "tp", "1f1b"):
        folder = tmp_path / name
        folder.mkdir()
        whole[name] = train(planner.make(tiny, two_ranks, name), folder, 20)["losses"]
        assert whole[name] == pytest.approx(whole["dp"], rel=1e-3)
        assert whole[name][-1] < 0.8 * whole[name][0]
    parts = tmp_path / "parts"
    parts.mkdir()
    before = train(planner.make(tiny, two_ranks, "dp"), parts, 10)["losses"]
    after = train(planner.make(tiny, two_ranks, "dp"), parts, 20)["losses"]
    assert before + after == pytest.approx(whole["dp"], rel=1e-6)


def test_a_checkpoint_of_another_run_is_refused(tiny, two_ranks, tmp_path: Path) -> None:
    plan = planner.make(tiny, two_ranks, "dp")
    about = {"step": 1, "about": {"model": "gpt-mini"}}
    folder = tmp_path / "checkpoints" / "step-00000001"
    record.write(folder / "about.json", kind="training-checkpoint", version=1, body=about)
    with pytest.raises(ToolkitError, match="is of a run with model 'gpt-mini'"):
        train(plan, tmp_path, 2)


def test_batches_depend_on_seed_and_step_alone() -> None:
    data = text.standard_library(max_bytes=100_000)
    one = data.batch(3, batch=4, tokens=16, seed=1)
    again = data.batch(3, batch=4, tokens=16, seed=1)
    other = data.batch(4, batch=4, tokens=16, seed=1)
    assert one["ids"].equal(again["ids"])
    assert not one["ids"].equal(other["ids"])
    assert one["ids"][:, 1:].equal(one["targets"][:, :-1])


def test_text_comes_from_files_folders_and_datasets(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("one fish two fish " * 20)
    (tmp_path / "rows.jsonl").write_text('{"text": "red fish"}\n{"text": "blue fish"}\n')
    (tmp_path / "names.jsonl").write_text('{"name": "red fish"}\n')
    assert len(text.load(str(tmp_path / "folder" / "a.txt"))) == 360
    pytest.importorskip("datasets")
    assert len(text.load(str(tmp_path / "folder"))) >= 350
    assert len(text.load(str(tmp_path / "rows.jsonl"))) == len("red fish\n\nblue fish")
    with pytest.raises(UsageError, match="has no column 'text'"):
        text.load(str(tmp_path / "names.jsonl"))
    with pytest.raises(UsageError, match="cannot read dataset"):
        text.load(str(tmp_path / "nothing.jsonl"))
