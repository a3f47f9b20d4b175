"""Searching lists equals brute force over the same lists; what is torn is named, never served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit import record
from toolkit.errors import FormatError, UsageError
from toolkit.rag import Retriever
from toolkit.rag import index as index_module
from toolkit.rag.corpus import Passage
from toolkit.rag.embed import EncoderInfo
from toolkit.rag.index import Index
from toolkit.rag.passages import PassageFile, write

DIMS = 16


def _make(path: Path, vectors: np.ndarray, num_lists: int) -> Index:
    """Commit an index of given vectors; passage i is the text "i"."""
    staged = path / index_module.BUILDING
    staged.mkdir(parents=True)
    write(staged, (Passage(i, "s", "", str(i), i + 1, i + 1) for i in range(len(vectors))))
    lists = index_module.train(vectors, num_lists, seed=0)
    lists.add(vectors)
    index_module.write_lists(lists, staged)
    manifest = index_module.Manifest(
        "g-000001",
        index_module.CorpusInfo("made", None, 75, 0),
        EncoderInfo("none", "", vectors.shape[1], 64, "mean"),
        len(vectors), num_lists, 1, 0,
        {name: index_module.mark(staged / name) for name in index_module.FILES},
    )  # fmt: skip
    index_module.commit(path, staged, manifest)
    return Index.open(path)


def _whole(count: int, seed: int) -> np.ndarray:
    """Vectors of small whole numbers: their products are exact in float32, and often equal."""
    return np.random.default_rng(seed).integers(-8, 9, (count, DIMS)).astype(np.float32)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    made = _whole(600, seed=0)
    made[100:140] = made[7]  # a tie of more than any k asked for below
    return made


@pytest.fixture(scope="module")
def made(vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return _make(tmp_path_factory.mktemp("index") / "made", vectors, num_lists=12)


def _brute_force(vectors: np.ndarray, query: np.ndarray, k: int) -> np.ndarray:
    scores = vectors @ query
    return np.lexsort((np.arange(len(vectors)), -scores))[:k]


@given(st.integers(0, 10**6), st.sampled_from([1, 3, 10, 45, 599, 600, 700]))
@settings(max_examples=60, deadline=None)
def test_all_lists_equal_brute_force(
    made: Index, vectors: np.ndarray, seed: int, k: int
) -> None:  # fmt: skip
    query = _whole(1, seed)[0]
    scores, ids = made.scan(query, made.rank(query, 12), k)
    np.testing.assert_array_equal(ids, _brute_force(vectors, query, k))
    np.testing.assert_array_equal(scores, vectors[ids] @ query)


@pytest.mark.parametrize("nprobe", [1, 2, 5, 11])
def test_some_lists_equal_brute_force_over_them(
    made: Index, vectors: np.ndarray, nprobe: int
) -> None:  # fmt: skip
    import faiss

    for seed in range(20):
        query = _whole(1, seed)[0]
        probed = made.rank(query, nprobe)
        lists = made._lists.invlists
        members = np.sort(
            np.concatenate(
                [faiss.rev_swig_ptr(lists.get_ids(int(n)), lists.list_size(int(n))) for n in probed]
            )
        )
        scores, ids = made.scan(query, probed, 10)
        np.testing.assert_array_equal(ids, members[_brute_force(vectors[members], query, 10)])
        np.testing.assert_array_equal(scores, vectors[ids] @ query)


def test_ties_are_in_the_order_of_ids_for_every_k(made: Index, vectors: np.ndarray) -> None:
    equal = [7, *range(100, 140)]
    query = 100 * vectors[7]  # so that nothing else comes near
    for k in (1, 5, 9, 30, 41, 50):
        scores, ids = made.scan(query, made.rank(query, 12), k)
        assert ids[:41].tolist() == equal[:k]
        assert (np.diff(scores) <= 0).all()


def test_lists_hold_every_vector_once(made: Index, vectors: np.ndarray) -> None:
    assert made.list_sizes().sum() == len(vectors)
    np.testing.assert_array_equal(made.vectors(), vectors)


def test_passages_are_read_by_id(made: Index) -> None:
    assert made.passages[300] == Passage(300, "s", "", "300", 301, 301)
    assert [p.id for p in made.passages] == list(range(600))
    for wrong in (-1, 600):
        with pytest.raises(IndexError):
            made.passages[wrong]


@pytest.fixture
def damaged(garden_index: Path, tmp_path: Path) -> Path:
    """A copy of an index, to be damaged."""
    return Path(shutil.copytree(garden_index, tmp_path / "copy"))


@pytest.mark.parametrize("name", index_module.FILES)
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_file_is_named(damaged: Path, name: str, damage: str) -> None:
    (file,) = damaged.glob(f"g-*/{name}")
    data = file.read_bytes()
    if damage == "cut":
        file.write_bytes(data[:-1])
    elif damage == "flipped":
        middle = len(data) // 2
        file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    else:
        file.unlink()
    said = {"cut": "is torn", "flipped": "was altered", "gone": "is missing"}[damage]
    with pytest.raises(FormatError, match=f"{name} {said}"):
        Index.open(damaged)


def test_a_damaged_manifest_is_named(damaged: Path) -> None:
    file = damaged / index_module.MANIFEST
    whole = file.read_text()
    file.write_text(whole[:-20])
    with pytest.raises(FormatError, match=r"manifest\.json is corrupt"):
        Retriever.open(damaged)
    file.write_text(whole.replace('"version": 1', '"version": 9'))
    with pytest.raises(FormatError, match="is version 9 of the index format"):
        Retriever.open(damaged)
    file.write_text(whole.replace('"num_lists": ', '"num_lists": 1'))
    with pytest.raises(FormatError, match="does not match its digest"):
        Retriever.open(damaged)
    file.unlink()
    with pytest.raises(UsageError, match="no index in"):
        Retriever.open(damaged)


def test_a_manifest_of_other_counts_is_refused(damaged: Path) -> None:
    file = damaged / index_module.MANIFEST
    body = json.loads(file.read_text())["body"]
    record.write(file, kind="index", version=1, body={**body, "num_passages": 3})
    with pytest.raises(FormatError, match="its manifest says"):
        Index.open(damaged)
    record.write(file, kind="index", version=1, body={**body, "compression": "pq"})
    with pytest.raises(UsageError, match="unknown key"):
        Index.open(damaged)


def test_passages_and_offsets_must_belong_together(damaged: Path) -> None:
    (folder,) = damaged.glob("g-*")
    with (folder / "passages.jsonl").open("ab") as file:
        file.write(b"{}\n")
    with pytest.raises(FormatError, match="does not belong to"):
        PassageFile(folder)


def test_nprobe_and_k_are_checked(garden_index: Path) -> None:
    retriever = Retriever.open(garden_index)
    lists = retriever.index.manifest.num_lists
    with pytest.raises(UsageError, match=f"use 1 to {lists}"):
        retriever.search("spade", nprobe=lists + 1)
    with pytest.raises(UsageError, match="at least 1 passage"):
        retriever.search("spade", k=0)
