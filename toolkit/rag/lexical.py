"""Search by words (BM25) beside search by vectors: what a name or a number needs.

The index of words is derived from an index's passages and lies in its folder, INDEX/lexical; it is
made when it is first asked for and again when the passages have changed. Making it holds the tokens
of all passages in memory; using it maps its files.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from toolkit import record
from toolkit.errors import ToolkitError, require
from toolkit.rag import folder
from toolkit.rag.retriever import Hit, Retriever
from toolkit.rag.store import LEXICAL, Store

_OF = "of.json"  # which state of the store it was made from


class Lexical:
    """BM25 over the passages of an index, one at a time per process."""

    def __init__(self, retriever: Retriever, bm25: Any, ids: np.ndarray) -> None:
        """Use `open`. `ids` [n] are the passages, in the order BM25 knows them."""
        self._retriever, self._bm25, self._ids = retriever, bm25, ids

    @classmethod
    def open(cls, retriever: Retriever) -> Lexical:
        """Open the index of words of an index, making it when it is not there or out of date.

        Raises MissingExtraError without bm25s, ToolkitError when its folder cannot be written.
        """
        bm25s = require("bm25s", extra="rag")
        path = retriever.store.path / LEXICAL
        if not _current(path, retriever.store):
            make(retriever.store)
        ids = np.load(path / "ids.npy")
        return cls(retriever, bm25s.BM25.load(path, mmap=True) if len(ids) else None, ids)

    def search(self, query: str, k: int) -> list[Hit]:
        """Return the `k` best passages by their words; none of those without a word of the query.

        The score of a hit is its cosine to nothing: BM25's weight, only to be compared with others.
        """
        if not len(self._ids):
            return []
        words = [word for word in tokens(query) if word in self._bm25.vocab_dict]
        if not words:
            return []
        weights = self._bm25.get_scores(words)
        order = np.lexsort((self._ids, -weights))[:k]
        store = self._retriever.store
        return [
            Hit(store.passage(int(self._ids[i])), float(weights[i]))
            for i in order
            if weights[i] > 0 and not store.is_deleted(int(self._ids[i]))
        ]


def tokens(text: str) -> list[str]:
    """Return the words of a text as BM25 compares them: lower case, marks cut off.

    >>> tokens("IVF-Flat's 2.0 __init__")
    ['ivf', 'flat', 's', '2', '0', '__init__']
    """
    return re.findall(r"\w+", text.lower())


def make(store: Store) -> None:
    """Write the index of words of a store, in place of an older one."""
    bm25s = require("bm25s", extra="rag")
    ids: list[int] = []
    words: list[list[str]] = []
    for passage in store.passages():
        if not store.is_deleted(passage.id):
            ids.append(passage.id)
            words.append(tokens(passage.embedded))
    path = store.path / LEXICAL
    new = path.with_name(f".{LEXICAL}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        if ids:
            bm25 = bm25s.BM25()
            bm25.index(words, show_progress=False)
            bm25.save(new)
        np.save(new / "ids.npy", np.array(ids, np.int64))
        record.write_bytes(new / _OF, json.dumps(_state(store)).encode())
        shutil.rmtree(path, ignore_errors=True)
        new.rename(path)
        folder.sync(store.path)
    except OSError as error:
        raise ToolkitError(f"cannot write {path}: {error.strerror or error}") from error


def _state(store: Store) -> dict[str, Any]:
    manifest = store.manifest
    deleted = manifest.deleted[1].sha256 if manifest.deleted else ""
    return {"segments": [info.checksum for info in manifest.segments], "deleted": deleted}


def _current(path: Path, store: Store) -> bool:
    try:
        return bool(json.loads((path / _OF).read_bytes()) == _state(store))
    except (OSError, ValueError):
        return False
