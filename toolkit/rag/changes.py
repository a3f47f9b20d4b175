"""Changes to a store, each whole or not at all: create, rebuild, add, delete, compact.

Files are written under names that nothing refers to, and flushed, before the manifest that names
them replaces the old one. So a writer killed at any moment leaves the store before its change or
after it, and what it acknowledged stays.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from toolkit import record
from toolkit.errors import ToolkitError, UsageError
from toolkit.rag import passages as texts
from toolkit.rag import store as stores
from toolkit.rag.corpus import Passage
from toolkit.rag.folder import locked, mark, sync
from toolkit.rag.quantizer import Quantizer
from toolkit.rag.segment import Segment, SegmentWriter
from toolkit.rag.spill import MEMORY_BYTES, Spill
from toolkit.rag.store import (
    BUILDING,
    LEXICAL,
    MANIFEST,
    CorpusInfo,
    Recipe,
    SegmentInfo,
    Store,
    StoreManifest,
    read_manifest,
)

_OURS = re.compile(r"manifest\.json|quantizer-\d{6}\.bin|s-\d{6}|deleted-\d{6}\.npy")


def create(path: Path, quantizer: Quantizer) -> None:
    """Make an empty store of bare vectors.

    Raises UsageError when `path` holds a store, or anything else.
    """
    with _changing(path, new=True):
        if (path / MANIFEST).exists():
            raise UsageError(f"{path} is a store already", remedy="add to it, or choose another")
        _commit(path, _begin(path, quantizer))


def rebuild(
    path: Path,
    quantizer: Quantizer,
    vectors: Iterable[np.ndarray],
    passages: Iterable[Passage],
    *,
    recipe: Recipe,
    corpus: tuple[str, str | None],
    memory_bytes: int = MEMORY_BYTES,
    progress: Callable[[int], None] | None = None,
) -> range:
    """Make a store of these vectors and passages, in place of the one that may be there.

    One commit: a store that was there serves until this one is complete. `corpus` is the (name,
    root) the passages come from. Returns their ids, which begin at 0. Memory, disk and errors are
    those of `add`.
    """
    with _changing(path, new=True):
        begun = replace(_begin(path, quantizer), recipe=recipe)
        return _extend(
            path, begun, quantizer, vectors, passages,
            corpus=corpus, memory_bytes=memory_bytes, progress=progress,
        )  # fmt: skip


def add(
    path: Path,
    vectors: Iterable[np.ndarray],
    passages: Iterable[Passage] | None = None,
    *,
    corpus: tuple[str, str | None] | None = None,
    replacing: Iterable[int] = (),
    memory_bytes: int = MEMORY_BYTES,
    progress: Callable[[int], None] | None = None,
) -> range:
    """Add vectors (float32 batches [n, D]) as a new segment; return the ids they were given.

    `passages`, one a vector and in the same order, get the same ids. The ids in `replacing` are
    deleted in the same commit. Memory: about `memory_bytes`, one batch, and 8 bytes a passage;
    disk: the segment twice over while it is written. `progress` is told how many vectors have been
    taken. When this returns, they outlive a crash. Raises UsageError for vectors of another width
    or not finite, when the counts differ, when an id to replace is not there, and when the store
    holds vectors with passages and these have none, or the other way round.
    """
    with _changing(path):
        manifest = read_manifest(path)
        quantizer = stores.read_quantizer(path, manifest)
        if any(bool(info.texts) != (passages is not None) for info in manifest.segments):
            raise UsageError(
                f"{path} holds vectors {'without' if passages is not None else 'with'} passages",
                remedy="add them alike, or to another store",
            )
        manifest, _ = _without(path, manifest, replacing)
        return _extend(
            path, manifest, quantizer, vectors, passages,
            corpus=corpus, memory_bytes=memory_bytes, progress=progress,
        )  # fmt: skip


def _begin(path: Path, quantizer: Quantizer) -> StoreManifest:
    """Write a quantizer; return the manifest of an empty store with it, to be committed."""
    sequence = read_manifest(path).sequence if (path / MANIFEST).exists() else 0
    name = f"quantizer-{sequence + 1:06d}.bin"
    quantizer.write(path / name)
    return StoreManifest(sequence, (name, mark(path / name)), 0, ())


def _extend(
    path: Path,
    manifest: StoreManifest,
    quantizer: Quantizer,
    vectors: Iterable[np.ndarray],
    passages: Iterable[Passage] | None,
    *,
    corpus: tuple[str, str | None] | None,
    memory_bytes: int,
    progress: Callable[[int], None] | None,
) -> range:
    """Write a new segment and commit `manifest` with it; without vectors, only the rest of it."""
    first_id = end_id = manifest.next_id
    with _new_segment(path, manifest) as folder:
        spill = Spill(folder / "spill", quantizer, memory_bytes=memory_bytes)
        with contextlib.closing(spill):
            for batch in vectors:
                spill.append(batch, end_id)
                end_id += len(batch)
                if progress:
                    progress(len(batch))
            if end_id == first_id:
                if manifest != _current(path):
                    _commit(path, manifest)
                return range(first_id, first_id)
            info = _write_segment(folder, quantizer, spill.lists(), first_id, end_id)
        shutil.rmtree(folder / "spill")
        if passages is not None:
            numbered = (replace(p, id=first_id + i) for i, p in enumerate(passages))
            num_texts = texts.write(folder, numbered, first_id=first_id)
            if num_texts != end_id - first_id:
                raise UsageError(f"{num_texts} passages for {end_id - first_id} vectors")
            info = _with_texts(info, folder)
        sync(folder)
        changed = replace(manifest, next_id=end_id, segments=(*manifest.segments, info))
        if corpus:
            new = CorpusInfo(*corpus, first_id, end_id)
            changed = replace(changed, corpora=(*manifest.corpora, new))
        _commit(path, changed)
    return range(first_id, end_id)


def _current(path: Path) -> StoreManifest | None:
    return read_manifest(path) if (path / MANIFEST).exists() else None


def delete(path: Path, ids: Iterable[int]) -> int:
    """Delete ids; return how many. When this returns, no search finds them, crash or not.

    Their bytes stay until `compact`. Raises UsageError, deleting nothing, when an id was never
    given or is deleted already.
    """
    with _changing(path):
        changed, count = _without(path, read_manifest(path), ids)
        if count:
            _commit(path, changed)
        return count


def _without(
    path: Path, manifest: StoreManifest, ids: Iterable[int]
) -> tuple[StoreManifest, int]:  # fmt: skip
    """Write a file of deleted ids with `ids` in it; return the manifest to commit, and a count."""
    chosen = np.unique(np.fromiter(ids, np.int64))
    if not len(chosen):
        return manifest, 0
    deleted = stores.read_deleted(path, manifest)
    unknown = chosen[(chosen < 0) | (chosen >= manifest.next_id) | np.isin(chosen, deleted)]
    if len(unknown):
        shown = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise UsageError(
            f"{len(unknown)} of {len(chosen)} ids are not in {path}: {shown}",
            remedy=f"give ids from 0 to {manifest.next_id - 1} that were not deleted",
        )
    name = f"deleted-{manifest.sequence + 1:06d}.npy"
    with record.atomic(path / name) as file:
        np.save(file, np.union1d(deleted, chosen))
    return replace(manifest, deleted=(name, mark(path / name))), len(chosen)


def compact(path: Path, num_last: int | None = None) -> int:
    """Write the last segments (all by default) as one, without what was deleted of them.

    Returns the bytes that it freed. Memory: one list, and 8 bytes an id. Ids stay as they are. What
    is read is checked: a corrupt list or text raises FormatError naming it, and the store stays as
    it was.
    """
    with _changing(path), contextlib.closing(Store.open(path)) as store:
        manifest = store.manifest
        old = manifest.segments[-num_last:] if num_last else manifest.segments
        parts = store.segments[len(manifest.segments) - len(old) :]
        if not old or (len(old) < 2 and not store.num_pending_in(old[0])):
            return 0
        for error in store.verify_texts(old):
            raise error
        before = _folder_bytes(path)
        segments = manifest.segments[: len(manifest.segments) - len(old)]
        with _new_segment(path, manifest) as folder:
            first_id, end_id = old[0].first_id, old[-1].end_id
            info = _write_segment(folder, store.quantizer, _merged(store, parts), first_id, end_id)
            if info.num_vectors:
                if any(each.texts for each in old):
                    alive = (p for p in store.passages(old) if not store.is_deleted(p.id))
                    texts.write(folder, alive, first_id=first_id, end_id=end_id)
                    info = _with_texts(info, folder)
                sync(folder)
                segments = (*segments, info)
            _commit(path, replace(manifest, segments=segments))
        _sweep(path)
        return before - _folder_bytes(path)


def set_nprobe(path: Path, nprobe: int) -> None:
    """Have searches of an index look into `nprobe` lists by default."""
    with _changing(path):
        manifest = read_manifest(path)
        quantizer = stores.read_quantizer(path, manifest)
        if manifest.recipe is None or not 1 <= nprobe <= quantizer.num_lists:
            raise UsageError(f"nprobe {nprobe} of {quantizer.num_lists} lists")
        _commit(path, replace(manifest, recipe=replace(manifest.recipe, nprobe=nprobe)))


def tidy(path: Path) -> int:
    """Compact what growth has left, if there is enough of it; return the bytes that it freed.

    The newest segments are merged while one is at most twice as large as all that came after it,
    so n additions leave about log2(n) segments and write each vector about as often; a store whose
    vectors are a third deleted is compacted whole.
    """
    with contextlib.closing(Store.open(path)) as store:
        if 2 * store.num_pending > store.num_vectors:
            num_last = len(store.segments)
        else:
            nums = [info.num_vectors for info in store.manifest.segments]
            num_last = 1
            while num_last < len(nums) and nums[-num_last - 1] <= 2 * sum(nums[-num_last:]):
                num_last += 1
            if num_last == 1:
                return 0
    return compact(path, num_last)


def _merged(
    store: Store, segments: list[Segment]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:  # fmt: skip
    """Yield each list of these segments together, without its deleted vectors."""
    for number in range(store.quantizer.num_lists):
        parts = [segment.read(number) for segment in segments]  # their ids ascend
        ids, codes = (np.concatenate(part) for part in zip(*parts, strict=True))
        alive = ~np.isin(ids, store.deleted, assume_unique=True)
        yield number, ids[alive], codes[alive]


def _write_segment(
    folder: Path,
    quantizer: Quantizer,
    lists: Iterable[tuple[int, np.ndarray, np.ndarray]],
    first_id: int,
    end_id: int,
) -> SegmentInfo:
    writer = SegmentWriter(folder / stores.LISTS, quantizer)
    with contextlib.closing(writer):
        for number, ids, codes in lists:
            writer.append(number, ids, codes)
        checksum = writer.finish(first_id, end_id)
    return SegmentInfo(folder.name, first_id, end_id, writer.num_vectors, checksum)


def _with_texts(info: SegmentInfo, folder: Path) -> SegmentInfo:
    names = (texts.PASSAGES, texts.OFFSETS)
    return replace(info, texts={name: mark(folder / name) for name in names})


@contextlib.contextmanager
def _new_segment(path: Path, manifest: StoreManifest) -> Iterator[Path]:
    """Yield the folder of the next segment."""
    folder = path / f"s-{manifest.sequence + 1:06d}"
    try:
        folder.mkdir()
        yield folder
    except OSError as error:
        raise ToolkitError(f"cannot write {folder}: {error.strerror or error}") from error


def _commit(path: Path, changed: StoreManifest) -> None:
    sync(path)  # the folders that the manifest is about to name
    body = asdict(replace(changed, sequence=changed.sequence + 1))
    record.write(path / MANIFEST, kind=stores.KIND, version=stores.VERSION, body=body)


@contextlib.contextmanager
def _changing(path: Path, *, new: bool = False) -> Iterator[None]:
    """Hold the store as its one writer; before and after, sweep away what is not current."""
    if not new:
        read_manifest(path)  # before a lock file is left in a folder that is no store
    with locked(path, ours):
        _sweep(path)
        try:
            yield
        finally:
            _sweep(path)


def ours(name: str) -> bool:
    """Say whether a store may hold a file or folder of that name."""
    return name in (BUILDING, LEXICAL) or _OURS.fullmatch(name) is not None


def _sweep(path: Path) -> None:
    """Delete what the manifest does not name: replaced, or left by a writer that failed or died."""
    manifest = _current(path)
    named = {MANIFEST}
    if manifest:
        named |= {manifest.quantizer[0], *(info.name for info in manifest.segments)}
    if manifest and manifest.deleted:
        named.add(manifest.deleted[0])
    for file in path.iterdir():
        torn = re.match(r"\.(manifest\.json|quantizer-.*|deleted-.*)\.", file.name)
        if torn or (_OURS.fullmatch(file.name) and file.name not in named):
            shutil.rmtree(file) if file.is_dir() else file.unlink()


def _folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
