"""An index on disk: a manifest, and the generation of files that it names.

    INDEX/manifest.json           record "index": encoder, counts, and each file's size and digest
    INDEX/g-000001/lists.faiss    FAISS IVF, full-precision vectors, inner product
    INDEX/g-000001/passages.jsonl, offsets.npy
    INDEX/building/               an unfinished build: passages and embedded shards

Replacing the manifest is the only commit: until that rename the old index is whole, after it the
new one is. Files are checked against the manifest before they are used.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolkit import config, record
from toolkit.errors import FormatError, ToolkitError, UsageError, require
from toolkit.rag.embed import EncoderInfo
from toolkit.rag.folder import sync
from toolkit.rag.passages import OFFSETS, PASSAGES, PassageFile

KIND, VERSION = "index", 1
MANIFEST, LISTS, BUILDING = "manifest.json", "lists.faiss", "building"
FILES = (LISTS, PASSAGES, OFFSETS)


@dataclass(frozen=True)
class FileMark:
    """What a file must be: its size and the SHA-256 of its contents."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class CorpusInfo:
    """What was indexed, and how it was cut. `root` is the folder that sources are relative to."""

    name: str
    root: str | None
    passage_words: int
    overlap_words: int
    limit: int | None = None


@dataclass(frozen=True)
class Manifest:
    """The body of manifest.json. `nprobe` is how many lists a search looks into by default."""

    generation: str
    corpus: CorpusInfo
    encoder: EncoderInfo
    num_passages: int
    num_lists: int
    nprobe: int
    seed: int
    files: Mapping[str, FileMark]


def default_num_lists(num_vectors: int) -> int:
    """Return how many lists to train for a corpus: 4 sqrt(n), if there is data to train them.

    4 to 16 sqrt(n) balances the two scans of a search, over centroids and over lists (FAISS's own
    guidelines); k-means wants 39 or more vectors a centroid, which is FAISS's warning level.

    >>> [default_num_lists(n) for n in (1, 100, 5_000, 100_000, 10_000_000)]
    [1, 2, 128, 1265, 12649]
    """
    return max(1, min(round(4 * math.sqrt(num_vectors)), num_vectors // 39))


def default_nprobe(num_lists: int) -> int:
    """Return how many lists to search: one in 16, as TeleRAG does (256 of 4,096), at least 64.

    The floor is for small indexes, where looking into more lists costs next to nothing and a
    sixteenth of them misses a tenth of the passages (`toolkit rag eval` measures both).

    >>> [default_nprobe(n) for n in (1, 10, 128, 4096)]
    [1, 10, 64, 256]
    """
    return max(math.ceil(num_lists / 16), min(num_lists, 64))


class Index:
    """An open index: vectors in lists, and the passages they stand for.

    Ranking and scanning are separate on purpose: what lookahead fetches is what `rank` names, and
    `scan` reads only the lists it is told to.
    """

    def __init__(self, path: Path, manifest: Manifest, lists: Any, passages: PassageFile) -> None:
        self.path = path
        self.manifest = manifest
        self.passages = passages
        self._lists = lists
        self._lists.nprobe = manifest.num_lists

    @classmethod
    def open(cls, path: Path) -> Index:
        """Open and check the index at `path`.

        Every byte is read once, to compare digests. Raises UsageError when there is no index,
        FormatError naming the file that is missing, torn, altered or of another version.
        """
        manifest = read_manifest(path)
        folder = path / manifest.generation
        try:
            for name, mark in manifest.files.items():
                _check(folder / name, mark)
        except FormatError:
            # A build that finished between the two reads has swept the older generation away.
            if read_manifest(path) == manifest:
                raise
            return cls.open(path)
        faiss = require("faiss", extra="rag")
        lists = faiss.read_index(str(folder / LISTS))
        found = (lists.ntotal, lists.d, lists.nlist)
        wanted = (manifest.num_passages, manifest.encoder.dims, manifest.num_lists)
        passages = PassageFile(folder)
        if found != wanted or len(passages) != manifest.num_passages:
            raise FormatError(
                f"{folder} holds {len(passages)} passages and {found} vectors, dims, lists; its "
                f"manifest says {wanted}",
                remedy="build the index again",
            )
        return cls(path, manifest, lists, passages)

    def rank(self, query_D: np.ndarray, nprobe: int) -> np.ndarray:  # noqa: N803
        """Return the numbers of the `nprobe` lists nearest to the query, nearest first."""
        _, lists = self._lists.quantizer.search(query_D[None], nprobe)
        return lists[0]

    def scan(
        self, query_D: np.ndarray, lists: np.ndarray, k: int  # noqa: N803
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """Return (scores, ids) of the best `k` vectors in `lists`, by score down, then id up.

        FAISS keeps an arbitrary one of equal scores at the k-th place, so more are fetched until
        the tie lies inside what was fetched: the order is total, and the same whatever `k`.
        """
        held = sum(self._lists.invlists.list_size(int(number)) for number in lists)
        fetch = min(k + 8, held)
        if fetch == 0:
            return np.empty(0, np.float32), np.empty(0, np.int64)
        # FAISS wants as many list numbers as its nprobe, which is state that threads share; set
        # once to every list, what is not to be scanned is -1.
        chosen = np.full((1, self.manifest.num_lists), -1, np.int64)
        chosen[0, : len(lists)] = lists
        while True:
            found = self._lists.search_preassigned(query_D[None], fetch, chosen, None)
            scores, ids = found[0][0], found[1][0]
            if fetch == held or scores[min(k, fetch) - 1] > scores[-1]:
                order = np.lexsort((ids, -scores))[:k]
                return scores[order], ids[order]
            fetch = min(2 * fetch, held)

    def list_sizes(self) -> np.ndarray:
        """Return the number of vectors in each list."""
        return np.array(
            [self._lists.invlists.list_size(i) for i in range(self.manifest.num_lists)], np.int64
        )

    def vectors(self) -> np.ndarray:
        """Return all vectors in id order, float32 [num_passages, dims]: for checks, by copying."""
        self._lists.make_direct_map()
        return self._lists.reconstruct_n(0, self.manifest.num_passages)

    def close(self) -> None:
        """Close the passages file."""
        self.passages.close()


def read_manifest(path: Path) -> Manifest:
    """Return what the index at `path` says it is. Raises UsageError or FormatError."""
    file = path / MANIFEST
    if not file.is_file():
        unfinished = (path / BUILDING).is_dir()
        raise UsageError(
            f"no index in {path}" + (", only an unfinished build" if unfinished else ""),
            remedy=f"{'finish' if unfinished else 'build'} it with: "
            f"toolkit rag build SOURCE -o {path}",
        )
    body = record.read(file, kind=KIND, version=VERSION)["body"]
    return config.parse(Manifest, body, where=str(file))


def train(sample_ND: np.ndarray, num_lists: int, *, seed: int) -> Any:  # noqa: N803
    """Return an empty FAISS IVF index with centroids trained on the sample, on the unit sphere."""
    faiss = require("faiss", extra="rag")
    dims = sample_ND.shape[1]
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dims), dims, num_lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = seed
    index.cp.spherical = True  # vectors have length 1, so centroids should
    index.cp.min_points_per_centroid = 1  # few passages are allowed; FAISS would print warnings
    index.train(np.ascontiguousarray(sample_ND, dtype=np.float32))
    return index


def write_lists(index: Any, folder: Path) -> None:
    """Write the FAISS index into `folder`, on disk before this returns."""
    faiss = require("faiss", extra="rag")
    path = folder / LISTS
    try:
        faiss.write_index(index, str(path))
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except (RuntimeError, OSError) as error:
        raise ToolkitError(f"cannot write {path}: {error}") from error


def commit(path: Path, staged: Path, manifest: Manifest) -> None:
    """Make the files in `staged` the index at `path`, then sweep away what it replaces.

    `manifest.generation` names the folder they move to. A crash before the manifest's rename
    leaves the old index; after it, only files that the next build sweeps away.
    """
    folder = path / manifest.generation
    if folder.exists():
        shutil.rmtree(folder)  # left by a build that died just before its commit
    folder.mkdir(parents=True)
    for name in manifest.files:
        (staged / name).rename(folder / name)
    for place in (folder, path):
        sync(place)
    record.write(path / MANIFEST, kind=KIND, version=VERSION, body=asdict(manifest))
    sweep(path, keep=manifest.generation)


def sweep(path: Path, *, keep: str) -> None:
    """Delete every generation but `keep`, and what unfinished builds have left."""
    for other in path.glob("g-*"):
        if other.name != keep:
            shutil.rmtree(other, ignore_errors=True)
    for torn in path.glob(f".{MANIFEST}.*"):
        torn.unlink(missing_ok=True)
    shutil.rmtree(path / BUILDING, ignore_errors=True)


def mark(path: Path) -> FileMark:
    """Return the size and digest of a file.

    >>> import tempfile; file = Path(tempfile.mkdtemp()) / "a"; _ = file.write_bytes(b"abc")
    >>> mark(file).num_bytes, mark(file).sha256[:8]
    (3, 'ba7816bf')
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else None
        if found is None:  # Python 3.10
            found = hashlib.sha256()
            while block := file.read(1 << 20):
                found.update(block)
    return FileMark(path.stat().st_size, found.hexdigest())


def _check(path: Path, wanted: FileMark) -> None:
    remedy = "build the index again"
    if not path.is_file():
        raise FormatError(f"{path} is missing from the index", remedy=remedy)
    num_bytes = path.stat().st_size
    if num_bytes != wanted.num_bytes:
        raise FormatError(
            f"{path} is torn: {num_bytes} bytes where the manifest says {wanted.num_bytes}",
            remedy=remedy,
        )
    if mark(path) != wanted:
        raise FormatError(f"{path} was altered: its digest is not the manifest's", remedy=remedy)
