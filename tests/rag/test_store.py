"""A store grows, shrinks and is killed: nothing acknowledged is lost, nothing damaged is served."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from toolkit import record
from toolkit.errors import FormatError, ToolkitError, UsageError
from toolkit.rag import changes
from toolkit.rag.corpus import Passage
from toolkit.rag.store import MANIFEST, Store, read_manifest

Cloud = Callable[..., np.ndarray]
MakeStore = Callable[..., Path]


def _texts(ids: Iterator[int] | range) -> list[Passage]:
    return [Passage(0, "s", "t", f"text {i}", 1, 1) for i in ids]


def _contents(path: Path) -> dict[int, tuple[bytes, str | None]]:
    """Return what a store holds: id -> (vector, text), each id once, deleted ones left out."""
    with contextlib.closing(Store.open(path)) as store:
        found = {}
        for number in range(store.quantizer.num_lists):
            for segment in store.segments:
                ids, codes = segment.read(number)
                for passage_id, vector in zip(ids, store.quantizer.decode(codes), strict=True):
                    if not store.is_deleted(passage_id):
                        assert passage_id not in found
                        text = store.passage(passage_id).text if any(store._texts) else None
                        found[int(passage_id)] = (vector.tobytes(), text)
        assert len(found) == store.num_vectors
        return found


def _expected(vectors: np.ndarray, ids: Iterator[int] | range) -> dict:
    return {i: (vectors[i].tobytes(), f"text {i}") for i in ids}


@pytest.fixture
def vectors(cloud: Cloud) -> np.ndarray:
    return cloud(400)


@pytest.fixture
def path(make_store: MakeStore, vectors: np.ndarray, tmp_path: Path) -> Path:
    """A store of ids 0 to 299, in two segments."""
    return make_store(tmp_path / "store", vectors[:300], segments=2, texts=True)


def test_adding_deleting_and_compacting(path: Path, vectors: np.ndarray) -> None:
    assert changes.add(path, [vectors[300:400]], _texts(range(300, 400))) == range(300, 400)
    assert _contents(path) == _expected(vectors, range(400))
    gone = {0, 7, 149, 150, 399, *range(200, 260)}
    assert changes.delete(path, gone) == len(gone)
    left = _expected(vectors, (i for i in range(400) if i not in gone))
    assert _contents(path) == left
    assert changes.compact(path) > 0
    with contextlib.closing(Store.open(path)) as store:
        assert store.verify() == []
    assert _contents(path) == left
    with contextlib.closing(Store.open(path)) as store:
        assert (len(store.segments), store.num_pending, store.alive) == (1, 0, None)
        for missing in (7, 399, 400, -1):
            with pytest.raises(IndexError, match=f"no passage {missing} in"):
                store.passage(missing)
    assert changes.compact(path) == 0
    # Ids are never given twice.
    assert changes.add(path, [vectors[:5]], _texts(range(5))) == range(400, 405)


def test_everything_can_be_deleted_and_compacted(path: Path, vectors: np.ndarray) -> None:
    changes.delete(path, range(300))
    assert changes.compact(path) > 0
    assert _contents(path) == {}
    assert changes.add(path, [vectors[300:]], _texts(range(300, 400))) == range(300, 400)
    assert _contents(path) == _expected(vectors, range(300, 400))


def test_an_open_store_keeps_reading_what_it_opened(path: Path) -> None:
    with contextlib.closing(Store.open(path)) as old:
        changes.delete(path, range(100))
        changes.compact(path)
        assert sorted(p.name for p in path.iterdir()) == [
            ".lock", "deleted-000004.npy", "manifest.json", "quantizer-000001.bin", "s-000005",
        ]  # fmt: skip
        assert old.num_vectors == 300
        # Its lists are whole; only the names of its texts are gone.
        assert [error for error in old.verify() if "lists.bin" in str(error)] == []
        assert old.passage(50).text == "text 50"


def test_what_cannot_be_changed_is_said_and_changes_nothing(
    path: Path, vectors: np.ndarray, tmp_path: Path
) -> None:
    before = _contents(path)
    changes.delete(path, [3])
    for ids, said in (
        ([299, 300], "1 of 2 ids are not in"),
        ([3], ": 3; give ids from 0 to 299 that were not deleted"),
        ([-1], ": -1;"),
    ):
        with pytest.raises(UsageError, match=said):
            changes.delete(path, ids)
    with pytest.raises(UsageError, match="9 passages for 10 vectors"):
        changes.add(path, [vectors[:10]], _texts(range(9)))
    with pytest.raises(UsageError, match="for an index of 24 dims"):
        changes.add(path, [vectors[:10], np.ones((1, 5), np.float32)], _texts(range(11)))
    with pytest.raises(UsageError, match="holds vectors with passages; add them alike"):
        changes.add(path, [vectors[:10]])
    assert changes.delete(path, []) == 0
    assert changes.add(path, [], []) == range(300, 300)
    del before[3]
    assert _contents(path) == before
    with pytest.raises(UsageError, match="is a store already"):
        changes.create(path, Store.open(path).quantizer)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        changes.create(tmp_path / "other", Store.open(path).quantizer)
    with pytest.raises(UsageError, match="no index in"):
        changes.delete(tmp_path / "nowhere", [1])


def test_two_writers_do_not_change_one_store(path: Path) -> None:
    with changes._changing(path), ThreadPoolExecutor() as other:
        refused = other.submit(changes.delete, path, [1])
        with pytest.raises(UsageError, match="another process is writing"):
            refused.result()


Change = tuple[str, Callable[[], object], "range | list[int]"]


def _changes(path: Path, vectors: np.ndarray) -> list[Change]:
    """Changes to a store of ids 0 to 299, and the ids it holds after each."""
    alive = [i for i in range(400) if i % 3]
    return [
        ("add", lambda: changes.add(path, [vectors[300:]], _texts(range(300, 400))), range(400)),
        ("delete", lambda: changes.delete(path, range(0, 400, 3)), alive),
        ("compact", lambda: changes.compact(path), alive),
    ]


def _killed_at(step: int, change: Callable[[], object]) -> bool:
    """Run a change in a process that is killed before its `step`th call that makes bytes last.

    Returns whether it lived to the end.
    """
    child = os.fork()
    if child == 0:
        calls = 0

        def deadly(call: Callable) -> Callable:
            def counted(*args: object, **kwargs: object) -> object:
                nonlocal calls
                calls += 1
                if calls == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return counted

        os.fsync = lambda handle: None  # a kill loses no page cache: what flushing is for, below
        for name in ("fsync", "replace", "mkdir", "rmdir"):
            setattr(os, name, deadly(getattr(os, name)))
        try:
            change()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), "the change failed, which is not what is tested"
    return status == 0


def test_a_writer_killed_at_any_step_leaves_the_state_before_or_after(
    path: Path, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "provenance", dict)  # it asks git, which takes most of the time
    held: range | list = range(300)
    kills = 0
    for name, change, after in _changes(path, vectors):
        before = _expected(vectors, held)
        wanted = _expected(vectors, after)
        for step in range(1, 200):
            lived = _killed_at(step, change)
            found = _contents(path)
            assert found in (before, wanted), f"{name} killed at step {step}"
            if lived:
                assert found == wanted
                break
            kills += 1
            if found == wanted and name != "compact":
                break  # it was past its commit, and cannot be done twice
        held = after
    assert kills > 20
    # What the killed ones left is swept away by the next change.
    changes.delete(path, [1])
    assert len(list(path.iterdir())) == 5


@pytest.mark.parametrize("texts", [True, False])
def test_nothing_is_named_before_it_is_on_disk(
    make_store: MakeStore, vectors: np.ndarray, tmp_path: Path, texts: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """kill -9 loses no page cache, a power cut does: so the order of flushes is looked at."""
    path = make_store(tmp_path / "store", vectors[:300], segments=2, texts=texts)
    flushed: set[int] = set()
    fsync, replace = os.fsync, os.replace

    def noted(handle: int) -> None:
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)

    checked = []

    def checking(source: str, target: str) -> None:
        if Path(target).name == MANIFEST:
            body = record.read(Path(source), kind="store", version=2)["body"]
            old = read_manifest(path)
            names = {info["name"] for info in body["segments"]} - {s.name for s in old.segments}
            new = [f for name in names for f in [path / name, *(path / name).iterdir()]]
            if body["deleted"] and (old.deleted is None or body["deleted"][0] != old.deleted[0]):
                new.append(path / body["deleted"][0])
            new.append(path)
            assert {f.name for f in new if f.stat().st_ino not in flushed} == set()
            checked.append(len(new))
            flushed.clear()
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", checking)
    changes.add(path, [vectors[300:]], _texts(range(300, 400)) if texts else None)
    changes.delete(path, range(0, 400, 3))
    changes.compact(path)
    assert checked == ([5, 2, 5] if texts else [3, 2, 3])


@pytest.mark.slow
def test_a_writer_killed_at_random_loses_nothing_it_acknowledged(
    path: Path, vectors: np.ndarray
) -> None:
    program = (
        "import sys, numpy as np; from pathlib import Path; from toolkit.rag import changes\n"
        "from toolkit.rag.corpus import Passage\n"
        "path = Path(sys.argv[1]); made = np.ones((1, 24), np.float32)\n"
        "texts = [Passage(0, 's', 't', 'x', 1, 1)] * 3\n"
        "while True:\n"
        "    ids = changes.add(path, [made] * 3, texts); print('+', *ids, flush=True)\n"
        "    changes.delete(path, ids[:1]); print('-', ids[0], flush=True)\n"
        "    if ids[0] % 4 == 0: changes.compact(path)\n"
    )
    draw = np.random.default_rng(0)
    alive = set(range(300))
    for _ in range(12):
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout
        said = [child.stdout.readline()]
        time.sleep(draw.uniform(0, 0.3))
        child.kill()
        said += child.stdout.readlines()
        child.wait()
        for line in said:
            sign, *ids = line.split()
            (alive.update if sign == "+" else alive.difference_update)(map(int, ids))
        held = set(_contents_ids(path))
        last = read_manifest(path).next_id
        assert alive - held <= {last - 3}  # a deletion that was done and not yet said
        assert held - alive <= {last - 3, last - 2, last - 1}  # an addition likewise
        alive = held


def _contents_ids(path: Path) -> list[int]:
    with contextlib.closing(Store.open(path)) as store:
        ids = [s.read(n)[0] for s in store.segments for n in range(store.quantizer.num_lists)]
        return [i for i in np.concatenate(ids).tolist() if not store.is_deleted(i)]


def test_a_full_disk_is_said_and_changes_nothing(path: Path, vectors: np.ndarray) -> None:
    before = _contents(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(ToolkitError, match=r"cannot write .*: File too large"):
            changes.add(path, [vectors], _texts(range(400)))
        with pytest.raises(ToolkitError, match="cannot write"):
            changes.compact(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert _contents(path) == before
    assert len(list(path.iterdir())) == 5


@pytest.mark.parametrize("file", ["lists.bin", "passages.jsonl", "offsets.npy"])
def test_a_missing_file_of_a_segment_is_named(path: Path, file: str) -> None:
    (path / "s-000002" / file).unlink()
    with pytest.raises(FormatError, match=f"s-000002/{file} is missing"):
        Store.open(path)


def test_a_damaged_store_is_named(path: Path) -> None:
    changes.delete(path, [1, 2])
    for file, said in (
        (path / "deleted-000004.npy", "deleted-000004.npy was altered"),
        (path / "quantizer-000001.bin", "quantizer-000001.bin was altered"),
        (path / "manifest.json", "does not match its digest"),
    ):
        whole = file.read_bytes()
        at = whole.index(b'"next_id"') + 11 if file.suffix == ".json" else len(whole) - 5
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(FormatError, match=said):
            Store.open(path)
        with pytest.raises(FormatError, match=said):
            changes.add(path, [], []) if file.suffix == ".bin" else changes.delete(path, [3])
        file.write_bytes(whole)
    first, second = path / "s-000002" / "lists.bin", path / "s-000003" / "lists.bin"
    whole = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(FormatError, match="is not the file that the manifest names"):
        Store.open(path)
    first.write_bytes(whole[:-1] + b"\1")
    texts = (path / "s-000003" / "passages.jsonl").read_bytes()
    (path / "s-000003" / "passages.jsonl").write_bytes(texts.replace(b"text 250", b"text 350"))
    with contextlib.closing(Store.open(path)) as store:
        lists, text = store.verify()
    assert "s-000002/lists.bin is corrupt in list " in str(lists)
    assert "s-000003/passages.jsonl was altered" in str(text)
    with pytest.raises(FormatError, match=r"passages\.jsonl was altered"):
        changes.compact(path)
    (path / "s-000003" / "passages.jsonl").write_bytes(texts)
    with pytest.raises(FormatError, match="is corrupt in list "):
        changes.compact(path)
    first.write_bytes(whole)
    assert changes.compact(path) > 0
