"""recipes/train.py end to end on two ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from toolkit import record
from toolkit.errors import ToolkitError, UsageError
from toolkit.hardware import find_cluster
from toolkit.plan import checkpoint, io, launch, planner, samples, subject, synthetic, text
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
    resumed = train(planner.make(tiny, two_ranks, "zero-2"), tmp_path, 4, "--check-parity", "1")
    assert resumed["first_step"] == 3
    assert len(resumed["losses"]) == 1
    assert resumed["parity"][0]["holds"]
    found = checkpoint.latest(tmp_path / "checkpoints")
    assert found is not None
    assert found.name == "step-00000004"
    assert not list((tmp_path / "checkpoints").glob(".*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "ranks"),
    [("fsdp", "tp", 2), ("zero-1", "fsdp", 2), ("1f1b", "zero-2", 2), ("zero-2", "zero-1", 4),
     ("hsdp", "dp", 4), ("fsdp-tp", "zero-1", 4)],
)  # fmt: skip
def test_a_run_goes_on_under_another_plan(
    before: str, after: str, ranks: int, tiny, tmp_path: Path
) -> None:
    """Parameters and moments alike: the losses are those of a run that never stopped."""
    cluster = find_cluster(f"cpux{ranks}")
    (tmp_path / "whole").mkdir()
    whole = train(planner.make(tiny, cluster, "dp"), tmp_path / "whole", 8)["losses"]
    first = train(planner.make(tiny, cluster, before), tmp_path, 4)["losses"]
    second = train(planner.make(tiny, cluster, after), tmp_path, 8, "--check-parity", "1")
    assert second["first_step"] == 4
    assert second["parity"][0]["holds"]
    assert first + second["losses"] == pytest.approx(whole, rel=1e-3)


@pytest.mark.slow
def test_a_killed_rank_is_started_again_from_the_last_checkpoint(
    tiny, two_ranks, tmp_path: Path
) -> None:
    plan, metrics, folder = tmp_path / "plan.json", tmp_path / "m.json", tmp_path / "run"
    io.save(planner.make(tiny, two_ranks, "zero-1"), plan)
    script = tmp_path / "dies_once.py"
    script.write_text(f"""
import os, pathlib, runpy, signal, sys, threading, time

def die():
    while not pathlib.Path({str(folder / "step-00000004")!r}).exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
    threading.Thread(target=die, daemon=True).start()
sys.argv[0] = {str(TRAIN)!r}
runpy.run_path({str(TRAIN)!r}, run_name="__main__")
""")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "--max-restarts", "1", str(script), "--plan", str(plan), "--steps", "200",
         "--checkpoint", str(folder), "--checkpoint-every", "2", "--json", str(metrics)],
        check=False, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    body = record.read(metrics, kind="training-metrics", version=1)["body"]
    assert 4 <= body["first_step"] < 200
    assert body["first_step"] + len(body["losses"]) == 200
    assert body["losses"][-1] < body["losses"][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "sizes", "said"),
    [("swin-nano", {}, "synthetic images"),
     ("t5-tiny", {"tokens": 16, "source_tokens": 16}, "standard library"),
     ("toolkit.plan.verify.matrix:evoformer_one_pass", {}, "synthetic alignments")],
)  # fmt: skip
def test_every_family_learns(model: str, sizes: dict, said: str, two_ranks, tmp_path: Path) -> None:
    traced = subject.load(model, batch=8, **sizes)
    plan = planner.make(traced, two_ranks, "zero-2", microbatches=2)
    metrics = train(plan, tmp_path, 30, "--learning-rate", "0.01")
    assert said in metrics["data"]
    losses = metrics["losses"]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_samples_are_those_of_the_model_and_depend_on_seed_and_step_alone() -> None:
    images = synthetic.Images(32, 3, 10)
    one, again, other = (images.batch(step, batch=4, seed=1) for step in (3, 3, 4))
    assert one["image_BCII"].shape == (4, 3, 32, 32)
    assert one["image_BCII"].equal(again["image_BCII"])
    assert not one["image_BCII"].equal(other["image_BCII"])
    proteins = synthetic.Alignments(4, 16, 64).batch(0, batch=2, seed=0)
    hidden = proteins["ids_BSR"] == 22
    assert 0 < hidden.float().mean() < 0.5
    assert proteins["ids_BSR"][~hidden].equal(proteins["residues_BSR"][~hidden])
    assert proteins["bins_BRR"].equal(proteins["bins_BRR"].transpose(1, 2))
    assert proteins["bins_BRR"].max() < 64


def test_a_dataset_of_text_for_a_model_of_images_is_refused(two_ranks) -> None:
    plan = planner.make(subject.load("swin-nano", batch=2), two_ranks, "dp")
    with pytest.raises(UsageError, match="synthetic data"):
        samples.of(plan, "words.txt")


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
