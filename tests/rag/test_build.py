"""Building: resumes after a kill, replaces only when complete, and refuses what it cannot do."""

from __future__ import annotations

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
from toolkit.rag import Built, Encoder, Retriever, build_index, find_corpus
from toolkit.rag.index import Index, read_manifest

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
    folder = path / read_manifest(path).generation
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


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
    assert sorted(p.name for p in path.iterdir()) == [".lock", "g-000001", "manifest.json"]


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
    assert Index.open(path).manifest.generation == "g-000002"
    # A reader that was open keeps reading what it opened.
    assert old.search("quince")[0].passage.text == "Quinces ripen late."
    assert not (path / "g-000001").exists()


def test_a_changed_document_is_embedded_again(tiny_dir: Path, tmp_path: Path) -> None:
    source, path = tmp_path / "docs", tmp_path / "index"
    source.mkdir()
    for name in "abc":
        (source / f"{name}.txt").write_text(f"{name * 5} text of a file that is named {name}.")
    _killed(source, path, tiny_dir, "embedding", 3)
    (source / "b.txt").write_text("Changed meanwhile.")
    built = _build(source, path, tiny_dir)
    assert built.num_reused == 0
    index = Index.open(path)
    texts = [p.embedded for p in index.passages]
    expected = Encoder.load(str(tiny_dir)).documents(texts)
    np.testing.assert_allclose(index.vectors(), expected, atol=1e-6)


def test_vectors_belong_to_their_passages(garden_index: Path) -> None:
    retriever = Retriever.open(garden_index)
    texts = [p.embedded for p in retriever.index.passages]
    expected = retriever.encoder.documents(texts)
    np.testing.assert_allclose(retriever.index.vectors(), expected, atol=1e-6)


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


def test_two_builds_do_not_write_one_index(garden: Path, tiny_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "index"
    path.mkdir()
    with (path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another process is writing"):
            _build(garden, path, tiny_dir)
