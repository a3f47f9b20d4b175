"""An index that grows: segments of lists, tombstones, and one manifest that says which count.

    STORE/manifest.json            record "store": the segments and the tombstones that are current
    STORE/quantizer-000001.bin     centroids and encoding, the same for every segment
    STORE/s-000002/lists.bin       lists of ids and codes (segment.py)
    STORE/s-000002/passages.jsonl, offsets.npy     their text, where vectors stand for passages
    STORE/deleted-000003.npy       every id that was ever deleted, ascending

Files are never changed, only added and then named by the next manifest (changes.py), so a store
that is open keeps reading the state it opened.
"""

from __future__ import annotations

import bisect
import fnmatch
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from toolkit import config, record
from toolkit.errors import FormatError, ToolkitError, UsageError, require
from toolkit.rag import passages as texts
from toolkit.rag.corpus import Passage
from toolkit.rag.embed import EncoderInfo
from toolkit.rag.folder import FileMark, mark
from toolkit.rag.quantizer import Quantizer
from toolkit.rag.segment import Segment

KIND, VERSION = "store", 2
MANIFEST, LISTS = "manifest.json", "lists.bin"
BUILDING, LEXICAL = "building", "lexical"  # folders: an unfinished build; an index of words

# A list of one segment: (serial of the segment, number of the list). A serial is never given
# twice, so what is in memory can outlive the state of the store that it was read from.
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

    @property
    def serial(self) -> int:
        """The number in its name: that of the change that wrote it."""
        return int(self.name.removeprefix("s-"))


@dataclass(frozen=True)
class Recipe:
    """How texts become the vectors of an index, and how many lists a search looks into."""

    encoder: EncoderInfo
    passage_words: int
    overlap_words: int
    nprobe: int


@dataclass(frozen=True)
class CorpusInfo:
    """Where the ids in [first_id, end_id) come from. `root` is what sources are relative to."""

    name: str
    root: str | None
    first_id: int
    end_id: int


@dataclass(frozen=True)
class StoreManifest:
    """The body of manifest.json. `sequence` counts changes, and names what each one wrote.

    A store of bare vectors has no recipe and no corpora.
    """

    sequence: int
    quantizer: tuple[str, FileMark]
    next_id: int
    segments: tuple[SegmentInfo, ...]
    deleted: tuple[str, FileMark] | None = None
    recipe: Recipe | None = None
    corpora: tuple[CorpusInfo, ...] = ()


class Store:
    """One state of a store, open for reading. Shapes: N ids, L lists."""

    def __init__(
        self,
        path: Path,
        manifest: StoreManifest,
        quantizer: Quantizer,
        deleted: np.ndarray,
        after: Store | None = None,
    ) -> None:
        """Use `open`: this takes parts that were checked and opens the segments."""
        self.path = path
        self.manifest = manifest
        self.quantizer = quantizer
        self.deleted = deleted  # int64, ascending; of all time
        self.segments: list[Segment] = []
        self._texts: list[texts.PassageFile | None] = []
        known = after._parts() if after else {}
        opened: list[Segment | texts.PassageFile] = []
        try:
            for info in manifest.segments:
                segment, held = known.get(info.name, (None, None))
                if segment is None:
                    segment = _open_segment(path, info, quantizer)
                    opened.append(segment)
                    if info.texts:
                        held = texts.PassageFile(path / info.name, info.first_id)
                        opened.append(held)
                self.segments.append(segment)
                self._texts.append(held)
        except (ToolkitError, OSError):
            for part in opened:
                part.close()
            raise
        self._by_serial = {
            info.serial: segment
            for info, segment in zip(manifest.segments, self.segments, strict=True)
        }
        self.num_pending = sum(map(self.num_pending_in, manifest.segments))

    def num_pending_in(self, info: SegmentInfo) -> int:
        """Return how many of a segment's vectors were deleted after it was written."""
        inside = np.diff(np.searchsorted(self.deleted, [info.first_id, info.end_id]))[0]
        return int(inside) - (info.end_id - info.first_id - info.num_vectors)

    @classmethod
    def open(cls, path: str | Path, *, after: Store | None = None) -> Store:
        """Open the store at `path` as its manifest describes it now.

        `after` is an earlier state: the files both name are shared, open, between the two; then
        close neither, they close when nothing refers to them. Reads quantizer, tombstones, and the
        header and table of every segment, and checks them; lists are checked as they are read (or
        all of them by `verify`). Raises UsageError when there is no index, FormatError naming the
        file that is missing, torn or altered.
        """
        path = Path(path)
        while True:
            manifest = read_manifest(path)
            try:
                if after and after.manifest.quantizer == manifest.quantizer:
                    quantizer = after.quantizer
                else:
                    quantizer, after = read_quantizer(path, manifest), None
                return cls(path, manifest, quantizer, read_deleted(path, manifest), after)
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
            (serial, int(number))
            for number in lists
            for serial, segment in self._by_serial.items()
            if segment.nums[number]
        ]

    def segment(self, key: Key) -> Segment:
        """Return the segment that a list belongs to."""
        return self._by_serial[key[0]]

    def num_bytes(self, key: Key) -> int:
        """Return the bytes of a list, on disk and in memory alike."""
        return int(self.segment(key).sizes[key[1]])

    def num_held(self, key: Key) -> int:
        """Return the number of vectors in a list, deleted ones among them."""
        return int(self.segment(key).nums[key[1]])

    def list_nums(self) -> np.ndarray:
        """Return the number of vectors in each list, int64 [L], deleted ones among them."""
        return sum((each.nums for each in self.segments), np.zeros(self.quantizer.num_lists, int))

    @property
    def num_bytes_held(self) -> int:
        """The bytes of all lists: the memory in which nothing is ever read twice."""
        return sum(int(each.sizes.sum()) for each in self.segments)

    def corpus(self, passage_id: int) -> CorpusInfo | None:
        """Return where a passage comes from."""
        found = (c for c in self.manifest.corpora if c.first_id <= passage_id < c.end_id)
        return next(found, None)

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

    def passages(self, segments: Sequence[SegmentInfo] | None = None) -> Iterator[Passage]:
        """Yield the text of segments (all by default) by ascending ids, that deleted since too."""
        names = {
            info.name for info in self.manifest.segments if segments is None or info in segments
        }
        held = [text for name, (_, text) in self._parts().items() if name in names]
        return itertools.chain.from_iterable(text for text in held if text)

    def of_sources(self, patterns: Sequence[str]) -> list[int]:
        """Return the ids of the passages whose source is, or matches, one of some patterns.

        `*` matches any run of characters. Raises UsageError naming a pattern that matches nothing.
        """
        ids: dict[str, list[int]] = {pattern: [] for pattern in patterns}
        for passage in self.passages():
            if not self.is_deleted(passage.id):
                for pattern in patterns:
                    if fnmatch.fnmatchcase(passage.source, pattern):
                        ids[pattern].append(passage.id)
        for pattern, found in ids.items():
            if not found:
                raise UsageError(
                    f"no source in {self.path} matches {pattern!r}",
                    remedy="sources are what `toolkit rag search` shows before the colon",
                )
        return sorted(set(itertools.chain.from_iterable(ids.values())))

    def is_deleted(self, passage_id: int) -> bool:
        """Say whether an id was deleted."""
        at = int(np.searchsorted(self.deleted, passage_id))
        return at < len(self.deleted) and int(self.deleted[at]) == passage_id

    def verify(self) -> list[FormatError]:
        """Read every byte; return an error for each list and file that is not what was written."""
        lists = itertools.chain.from_iterable(each.verify() for each in self.segments)
        return [*lists, *self.verify_texts()]

    def verify_texts(self, segments: Sequence[SegmentInfo] | None = None) -> list[FormatError]:
        """Read the text of segments (all by default); return an error for each altered file."""
        bad = []
        for info in self.manifest.segments if segments is None else segments:
            for name, wanted in info.texts.items():
                file = self.path / info.name / name
                if not file.is_file() or mark(file) != wanted:
                    bad.append(FormatError(f"{file} was altered: its digest is not the manifest's"))
        return bad

    def _parts(self) -> dict[str, tuple[Segment, texts.PassageFile | None]]:
        names = [info.name for info in self.manifest.segments]
        return dict(zip(names, zip(self.segments, self._texts, strict=True), strict=True))

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
        unfinished = (path / BUILDING).is_dir()
        raise UsageError(
            f"no index in {path}" + (", only an unfinished build" if unfinished else ""),
            remedy=f"{'finish' if unfinished else 'build'} it with: "
            f"toolkit rag build SOURCE -o {path}",
        )
    body = record.read(file, kind=KIND, version=VERSION)["body"]
    return config.parse(StoreManifest, body, where=str(file))


def read_quantizer(path: Path, manifest: StoreManifest) -> Quantizer:
    """Return the quantizer of the store at `path`, checked against its manifest."""
    name, wanted = manifest.quantizer
    quantizer = Quantizer.read(path / name)
    if mark(path / name) != wanted:
        raise FormatError(f"{path / name} belongs to another store")
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
