"""Building: resumes after a kill, replaces only when complete, and refuses what it cannot do."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from toolkit.errors import UsageError
from toolkit.hardware.affinity import thread_environment
from toolkit.rag import (
    Built,
    Encoder,
    Passage,
    Retriever,
    Updated,
    build_index,
    changes,
    find_corpus,
    update_index,
)
from toolkit.rag.store import Store, read_manifest

_BUILD = """
import os, signal, sys
from pathlib import Path
from toolkit.rag import Encoder, build_index, find_corpus

source, path, encoder, stage, count = sys.argv[1:]

def die(at, done, total):
    if at == stage and done >= int(count):
        os.kill(os.getpid(), signal.SIGKILL)

build_index(find_corpus(source), Path(path), Encoder.load(encoder), passage_words=12,
            shard_passages=3, progress=die)
"""


def _build(source: Path, path: Path, encoder: Path, **how: object) -> Built:
    settings: dict = {"passage_words": 12, "shard_passages": 3, **how}
    return build_index(find_corpus(str(source)), path, Encoder.load(str(encoder)), **settings)


def _killed(source: Path, path: Path, encoder: Path, stage: str, count: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, str(source), str(path), str(encoder), stage, str(count)],
        env={**os.environ, **thread_environment(1)}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def _files(path: Path) -> dict[str, bytes]:
    (info,) = read_manifest(path).segments
    files = [*sorted((path / info.name).iterdir()), *path.glob("quantizer-*")]
    return {file.name.split("-")[0]: file.read_bytes() for file in files}


def _vectors(path: Path) -> tuple[list[str], np.ndarray]:
    """Return the texts and vectors of an index, by id."""
    with contextlib.closing(Store.open(path)) as store:
        found = {}
        for segment in store.segments:
            for number in range(store.quantizer.num_lists):
                ids, codes = segment.read(number)
                found.update(zip(ids.tolist(), store.quantizer.decode(codes), strict=True))
        ids = sorted(i for i in found if not store.is_deleted(i))
        return [store.passage(i).embedded for i in ids], np.stack([found[i] for i in ids])


@pytest.fixture(scope="module")
def whole(
    garden: Path, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The files of a build that nothing interrupted."""
    path = tmp_path_factory.mktemp("whole") / "index"
    built = _build(garden, path, tiny_dir)
    assert built.num_reused == 0
    assert built.num_passages > 6
    assert set(built.seconds) == {"reading", "embedding", "training", "writing"}
    return _files(path)


@pytest.mark.parametrize(
    ("stage", "count", "reused"), [("embedding", 7, 6), ("writing", 1, 10), ("reading", 1, 0)]
)
def test_a_killed_build_goes_on_to_the_same_index(
    garden: Path, tiny_dir: Path, tmp_path: Path, whole: dict[str, bytes],
    stage: str, count: int, reused: int,
) -> None:  # fmt: skip
    path = tmp_path / "index"
    _killed(garden, path, tiny_dir, stage, count)
    with pytest.raises(UsageError, match="only an unfinished build"):
        Retriever.open(path)
    built = _build(garden, path, tiny_dir)
    assert built.num_reused == min(reused, built.num_passages)
    assert _files(path) == whole
    assert sorted(p.name for p in path.iterdir()) == [
        ".lock", "manifest.json", "quantizer-000001.bin", "s-000001",
    ]  # fmt: skip


def test_the_old_index_serves_until_the_new_one_is_complete(
    garden: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    path, other = tmp_path / "index", tmp_path / "other.md"
    other.write_text("Quinces ripen late.")
    _build(other, path, tiny_dir)
    _killed(garden, path, tiny_dir, "writing", 0)
    old = Retriever.open(path)
    assert [hit.passage.source for hit in old.search("quince", k=5)] == ["other.md"]
    _build(garden, path, tiny_dir)
    assert [info.name for info in read_manifest(path).segments] == ["s-000002"]
    # A reader that was open keeps reading what it opened.
    assert old.search("quince")[0].passage.text == "Quinces ripen late."
    assert not (path / "s-000001").exists()


def test_a_changed_document_is_embedded_again(tiny_dir: Path, tmp_path: Path) -> None:
    source, path = tmp_path / "docs", tmp_path / "index"
    source.mkdir()
    for name in "abc":
        (source / f"{name}.txt").write_text(f"{name * 5} text of a file that is named {name}.")
    _killed(source, path, tiny_dir, "embedding", 3)
    (source / "b.txt").write_text("Changed meanwhile.")
    built = _build(source, path, tiny_dir)
    assert built.num_reused == 0
    texts, vectors = _vectors(path)
    expected = Encoder.load(str(tiny_dir)).documents(texts)
    np.testing.assert_allclose(vectors, expected, atol=1e-6)


def test_vectors_belong_to_their_passages(garden_index: Path) -> None:
    texts, vectors = _vectors(garden_index)
    expected = Retriever.open(garden_index).encoder.documents(texts)
    np.testing.assert_allclose(vectors, expected, atol=1e-6)


def test_the_same_build_gives_the_same_bytes(
    garden: Path, tiny_dir: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    _build(garden, tmp_path / "index", tiny_dir)
    assert _files(tmp_path / "index") == whole


def test_what_cannot_be_built_is_said(garden: Path, tiny_dir: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "photo.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match=r"nothing to index.*; 1 files were not readable"):
        _build(empty, tmp_path / "a", tiny_dir)
    with pytest.raises(UsageError, match="999 lists for"):
        _build(garden, tmp_path / "b", tiny_dir, num_lists=999)
    with pytest.raises(UsageError, match="nprobe 3 of 2 lists; use 1 to 2"):
        _build(garden, tmp_path / "c", tiny_dir, num_lists=2, nprobe=3)
    with pytest.raises(UsageError, match="holds other files than an index"):
        _build(garden, empty, tiny_dir)
    with pytest.raises(UsageError, match="is a file"):
        _build(garden, garden / "guide.md", tiny_dir)


def _update(source: Path, path: Path, encoder: Path, **how: object) -> Updated:
    settings: dict = {"shard_passages": 3, **how}
    return update_index(find_corpus(str(source)), path, Encoder.load(str(encoder)), **settings)


def _sources(path: Path) -> dict[str, int]:
    with contextlib.closing(Store.open(path)) as store:
        held = [p.source for p in store.passages() if not store.is_deleted(p.id)]
        return {source: held.count(source) for source in held}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "docs"
    source.mkdir()
    for name in "abcdef":
        (source / f"{name}.txt").write_text(f"{name * 5} text of a file that is named {name}.")
    return source


def test_an_index_follows_its_source(folder: Path, tiny_dir: Path, tmp_path: Path) -> None:
    path, other = tmp_path / "index", tmp_path / "other.md"
    other.write_text("Quinces ripen late.")
    _build(folder, path, tiny_dir)
    _update(other, path, tiny_dir)
    assert set(_sources(path)) == {*(f"{name}.txt" for name in "abcdef"), "other.md"}
    (folder / "a.txt").write_text("Changed meanwhile.")
    (folder / "b.txt").unlink()
    (folder / "g.txt").write_text("Quite new.")
    done = _update(folder, path, tiny_dir)
    assert (done.num_added, done.num_unchanged, done.num_deleted) == (2, 4, 2)
    assert set(_sources(path)) == {*(f"{name}.txt" for name in "acdefg"), "other.md"}
    texts, vectors = _vectors(path)
    expected = Encoder.load(str(tiny_dir)).documents(texts)
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert not (path / "building").exists()
    # Nothing changed: nothing is done.
    again = _update(folder, path, tiny_dir)
    assert (again.num_added, again.num_unchanged, again.num_deleted) == (0, 6, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="nothing to index"):
        _update(tmp_path / "empty", path, tiny_dir)
    (folder / "a.txt").unlink()
    assert _update(folder, path, tiny_dir, keep=True).num_deleted == 0
    retriever = Retriever.open(path)
    (hit,) = retriever.search("quinces", k=1, nprobe=retriever.num_lists)
    file = retriever.file(hit.passage)
    assert file is not None
    assert file.is_file()


_UPDATE = _BUILD.replace("build_index(", "update_index(").replace(
    " Encoder, build_index,", " Encoder, update_index,"
).replace("passage_words=12,\n            ", "")  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "count", "reused"), [("reading", 1, 0), ("embedding", 4, 3), ("writing", 2, 6)]
)
def test_a_killed_update_leaves_the_old_index_and_goes_on(
    folder: Path, tiny_dir: Path, tmp_path: Path, stage: str, count: int, reused: int
) -> None:
    path = tmp_path / "index"
    _build(folder, path, tiny_dir)
    before = _sources(path)
    for i in range(6):
        (folder / f"new{i}.txt").write_text(f"The new text number {i * 37}.")
    (folder / "a.txt").unlink()
    done = subprocess.run(
        [sys.executable, "-c", _UPDATE, str(folder), str(path), str(tiny_dir), stage, str(count)],
        env={**os.environ, **thread_environment(1)}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    after = {**before, **{f"new{i}.txt": 1 for i in range(6)}}
    del after["a.txt"]
    committed = _sources(path) == after
    assert committed or _sources(path) == before
    again = _update(folder, path, tiny_dir)
    if not committed:
        assert (again.num_added, again.num_deleted, again.num_reused) == (6, 1, reused)
    assert _sources(path) == after


def test_citations_follow_lines_that_move(folder: Path, tiny_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "index"
    _build(folder, path, tiny_dir)
    text = (folder / "c.txt").read_text()
    (folder / "c.txt").write_text("\n\n\n" + text)
    assert _update(folder, path, tiny_dir).num_added == 1
    with contextlib.closing(Store.open(path)) as store:
        (place,) = [p.place for p in store.passages() if p.source == "c.txt" and
                    not store.is_deleted(p.id)]  # fmt: skip
    assert place == "c.txt:4"


def test_many_additions_leave_few_segments(folder: Path, tiny_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "index"
    _build(folder, path, tiny_dir)
    for i in range(12):
        (folder / f"new{i}.txt").write_text(f"The new text number {i * 37}.")
        _update(folder, path, tiny_dir)
    assert len(read_manifest(path).segments) <= 5
    assert len(_vectors(path)[0]) == 18
    changes.delete(path, range(8))
    assert changes.tidy(path) > 0
    with contextlib.closing(Store.open(path)) as store:
        assert (len(store.segments), store.num_pending, store.num_vectors) == (1, 0, 10)


def test_an_open_index_goes_on_with_a_change_and_keeps_its_memory(
    folder: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "index"
    _build(folder, path, tiny_dir)
    retriever = Retriever.open(path)
    retriever.search("aaaaa", k=1, nprobe=retriever.num_lists)
    before = retriever.tiers.traffic().read_bytes
    assert before > 0
    assert not retriever.refresh()
    (folder / "new.txt").write_text("zebra zebra zebra")
    with contextlib.closing(Store.open(path)) as store:
        first = store.num_bytes_held
    changes_before = read_manifest(path).sequence
    documents = Encoder.load(str(tiny_dir)).documents(["new\nzebra zebra zebra"])
    changes.add(path, [documents], [Passage(0, "new.txt", "new", "zebra zebra zebra", 1, 1)])
    assert read_manifest(path).sequence == changes_before + 1
    assert retriever.refresh()
    (hit,) = retriever.search("new\nzebra zebra zebra", k=1, nprobe=retriever.num_lists)
    assert hit.passage.source == "new.txt"
    # Only the new segment was read.
    assert retriever.tiers.traffic().read_bytes - before == retriever.store.num_bytes_held - first
    changes.compact(path)
    assert retriever.refresh()
    (hit,) = retriever.search("new\nzebra zebra zebra", k=1, nprobe=retriever.num_lists)
    assert hit.passage.source == "new.txt"
    retriever.close()


def test_two_builds_do_not_write_one_index(garden: Path, tiny_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "index"
    path.mkdir()
    with (path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another process is writing"):
            _build(garden, path, tiny_dir)
