"""An index that grows: segments of lists, tombstones, and one manifest that says which count.

    STORE/manifest.json            record "store": the segments and the tombstones that are current
    STORE/quantizer.bin            centroids and encoding, the same for every segment
    STORE/s-000002/lists.bin       lists of ids and codes (segment.py)
    STORE/s-000002/passages.jsonl, offsets.npy     their text, where vectors stand for passages
    STORE/deleted-000003.npy       every id that was ever deleted, ascending

Files are never changed, only added and then named by the next manifest (changes.py), so a store
that is open keeps reading the state it opened.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from toolkit import config, record
from toolkit.errors import FormatError, ToolkitError, UsageError, require
from toolkit.rag import passages as texts
from toolkit.rag.corpus import Passage
from toolkit.rag.index import FileMark, mark
from toolkit.rag.quantizer import Quantizer
from toolkit.rag.segment import Segment

KIND, VERSION = "store", 1
MANIFEST, QUANTIZER, LISTS = "manifest.json", "quantizer.bin", "lists.bin"

# A list of one segment: (position of the segment, number of the list).
Key = tuple[int, int]


@dataclass(frozen=True)
class SegmentInfo:
    """A segment as the manifest names it: ids in [first_id, end_id), some of them dropped."""

    name: str
    first_id: int
    end_id: int
    num_vectors: int
    checksum: str  # of the header of its lists
    texts: Mapping[str, FileMark] = field(default_factory=dict)


@dataclass(frozen=True)
class StoreManifest:
    """The body of manifest.json. `sequence` counts changes, and names what each one wrote."""

    sequence: int
    quantizer: FileMark
    next_id: int
    segments: tuple[SegmentInfo, ...]
    deleted: tuple[str, FileMark] | None = None


class Store:
    """One state of a store, open for reading. Shapes: N ids, L lists."""

    def __init__(
        self, path: Path, manifest: StoreManifest, quantizer: Quantizer, deleted: np.ndarray
    ) -> None:
        """Use `open`: this takes parts that were checked and opens the segments."""
        self.path = path
        self.manifest = manifest
        self.quantizer = quantizer
        self.deleted = deleted  # int64, ascending; of all time
        self.segments: list[Segment] = []
        self._texts: list[texts.PassageFile | None] = []
        try:
            for info in manifest.segments:
                self.segments.append(_open_segment(path, info, quantizer))
                folder = path / info.name
                held = texts.PassageFile(folder, info.first_id) if info.texts else None
                self._texts.append(held)
        except (ToolkitError, OSError):
            self.close()
            raise
        # A tombstone inside a segment's range is pending unless the segment was written after it.
        inside = [
            int(np.diff(np.searchsorted(deleted, [info.first_id, info.end_id]))[0])
            for info in manifest.segments
        ]
        dropped = [info.end_id - info.first_id - info.num_vectors for info in manifest.segments]
        self.num_pending = sum(inside) - sum(dropped)

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open the store at `path` as its manifest describes it now.

        Reads quantizer, tombstones, and the header and table of every segment, and checks them;
        lists are checked as they are read (or all of them by `verify`). Raises UsageError when
        there is no store, FormatError naming the file that is missing, torn or altered.
        """
        path = Path(path)
        while True:
            manifest = read_manifest(path)
            try:
                quantizer = read_quantizer(path, manifest)
                return cls(path, manifest, quantizer, read_deleted(path, manifest))
            except (ToolkitError, OSError):
                # A change between the two reads sweeps away what the older manifest names.
                if read_manifest(path) == manifest:
                    raise

    @property
    def num_vectors(self) -> int:
        """The vectors a search may find: those written, less those deleted since."""
        return sum(segment.num_vectors for segment in self.segments) - self.num_pending

    def keys(self, lists: Iterable[int]) -> list[Key]:
        """Return where the vectors of these lists are: a key for each segment that has some."""
        return [
            (position, int(number))
            for number in lists
            for position, segment in enumerate(self.segments)
            if segment.nums[number]
        ]

    def num_bytes(self, key: Key) -> int:
        """Return the bytes of a list, on disk and in memory alike."""
        position, number = key
        return int(self.segments[position].sizes[number])

    def num_held(self, key: Key) -> int:
        """Return the number of vectors in a list, deleted ones among them."""
        position, number = key
        return int(self.segments[position].nums[number])

    @functools.cached_property
    def alive(self) -> Any | None:
        """A FAISS selector of the ids that are not deleted, a bit each; None when that is all."""
        return self._selector(np.ones(self.manifest.next_id, bool)) if self.num_pending else None

    def among(self, ids: np.ndarray) -> Any:
        """Return a selector of those of some ids (int64) that are not deleted: a search's filter.

        Raises UsageError for ids that were never given.
        """
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.manifest.next_id:
            raise UsageError(
                f"ids from {ids.min()} to {ids.max()} to search among",
                remedy=f"give ids from 0 to {self.manifest.next_id - 1}",
            )
        chosen = np.zeros(self.manifest.next_id, bool)
        chosen[ids] = True
        return self._selector(chosen)

    def _selector(self, chosen: np.ndarray) -> Any:
        chosen[self.deleted] = False
        bits = np.packbits(chosen, bitorder="little")
        return require("faiss", extra="rag").IDSelectorBitmap(bits)

    def passage(self, passage_id: int) -> Passage:
        """Return the passage of an id. Raises IndexError when there is none, FormatError."""
        starts = [info.first_id for info in self.manifest.segments]
        position = bisect.bisect_right(starts, passage_id) - 1
        held = self._texts[position] if position >= 0 else None
        known = passage_id < self.manifest.next_id and not self.is_deleted(passage_id)
        if held is None or not known:
            raise IndexError(f"no passage {passage_id} in {self.path}")
        return held[passage_id]

    def passages(self) -> Iterator[Passage]:
        """Yield all text by ascending ids, that of vectors deleted since too."""
        return itertools.chain.from_iterable(held for held in self._texts if held)

    def is_deleted(self, passage_id: int) -> bool:
        """Say whether an id was deleted."""
        at = int(np.searchsorted(self.deleted, passage_id))
        return at < len(self.deleted) and int(self.deleted[at]) == passage_id

    def verify(self) -> list[FormatError]:
        """Read every byte; return an error for each list and file that is not what was written."""
        lists = itertools.chain.from_iterable(each.verify() for each in self.segments)
        return [*lists, *self.verify_texts()]

    def verify_texts(self) -> list[FormatError]:
        """Read all text; return an error for each of its files that is not what was written."""
        bad = []
        for info in self.manifest.segments:
            for name, wanted in info.texts.items():
                file = self.path / info.name / name
                if not file.is_file() or mark(file) != wanted:
                    bad.append(FormatError(f"{file} was altered: its digest is not the manifest's"))
        return bad

    def close(self) -> None:
        """Close the files."""
        for segment in self.segments:
            segment.close()
        for held in self._texts:
            if held:
                held.close()


def read_manifest(path: Path) -> StoreManifest:
    """Return what the store at `path` says it is. Raises UsageError or FormatError."""
    file = path / MANIFEST
    if not file.is_file():
        raise UsageError(f"no store in {path}", remedy="create one first")
    body = record.read(file, kind=KIND, version=VERSION)["body"]
    return config.parse(StoreManifest, body, where=str(file))


def read_quantizer(path: Path, manifest: StoreManifest) -> Quantizer:
    """Return the quantizer of the store at `path`, checked against its manifest."""
    quantizer = Quantizer.read(path / QUANTIZER)
    if mark(path / QUANTIZER) != manifest.quantizer:
        raise FormatError(f"{path / QUANTIZER} belongs to another store")
    return quantizer


def read_deleted(path: Path, manifest: StoreManifest) -> np.ndarray:
    """Return every id that was ever deleted, int64, ascending, checked against the manifest."""
    if manifest.deleted is None:
        return np.empty(0, np.int64)
    name, wanted = manifest.deleted
    file = path / name
    if not file.is_file():
        raise FormatError(f"{file} is missing, and with it what was deleted")
    if mark(file) != wanted:
        raise FormatError(f"{file} was altered: its digest is not the manifest's")
    return np.load(file)


def _open_segment(path: Path, info: SegmentInfo, quantizer: Quantizer) -> Segment:
    segment = Segment(path / info.name / LISTS, quantizer)
    if segment.checksum != info.checksum:
        segment.close()
        raise FormatError(f"{segment.path} is not the file that the manifest names")
    return segment
