"""Changes to a store, each whole or not at all: create, add, delete, compact.

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
from toolkit.rag.folder import locked, sync
from toolkit.rag.index import mark
from toolkit.rag.quantizer import Quantizer
from toolkit.rag.segment import SegmentWriter
from toolkit.rag.spill import MEMORY_BYTES, Spill
from toolkit.rag.store import MANIFEST, QUANTIZER, SegmentInfo, Store, StoreManifest, read_manifest

_OURS = re.compile(r"manifest\.json|quantizer\.bin|s-\d{6}|deleted-\d{6}\.npy")


def create(path: Path, quantizer: Quantizer) -> None:
    """Make an empty store. Raises UsageError when `path` holds one, or anything else."""
    with _changing(path, new=True):
        if (path / MANIFEST).exists():
            raise UsageError(f"{path} is a store already", remedy="add to it, or choose another")
        quantizer.write(path / QUANTIZER)
        _commit(path, StoreManifest(0, mark(path / QUANTIZER), 0, ()))


def add(
    path: Path,
    vectors: Iterable[np.ndarray],
    passages: Iterable[Passage] | None = None,
    *,
    memory_bytes: int = MEMORY_BYTES,
    progress: Callable[[int], None] | None = None,
) -> range:
    """Add vectors (float32 batches [n, D]) as a new segment; return the ids they were given.

    `passages`, one a vector and in the same order, get the same ids. Memory: about `memory_bytes`,
    one batch, and 8 bytes a passage; disk: the segment twice over while it is written. `progress`
    is told how many vectors have been taken. When this returns, they outlive a crash. Raises
    UsageError for vectors of another width or not finite, when the counts differ, and when the
    store holds vectors with passages and these have none, or the other way round.
    """
    with _changing(path):
        manifest = read_manifest(path)
        quantizer = stores.read_quantizer(path, manifest)
        first_id = end_id = manifest.next_id
        if any(bool(info.texts) != (passages is not None) for info in manifest.segments):
            raise UsageError(
                f"{path} holds vectors {'without' if passages is not None else 'with'} passages",
                remedy="add them alike, or to another store",
            )
        with _new_segment(path, manifest) as folder:
            spill = Spill(folder / "spill", quantizer, memory_bytes=memory_bytes)
            with contextlib.closing(spill):
                for batch in vectors:
                    spill.append(batch, end_id)
                    end_id += len(batch)
                    if progress:
                        progress(len(batch))
                if end_id == first_id:
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
            _commit(path, changed)
        return range(first_id, end_id)


def delete(path: Path, ids: Iterable[int]) -> int:
    """Delete ids; return how many. When this returns, no search finds them, crash or not.

    Their bytes stay until `compact`. Raises UsageError, deleting nothing, when an id was never
    given or is deleted already.
    """
    with _changing(path):
        manifest = read_manifest(path)
        chosen = np.unique(np.fromiter(ids, np.int64))
        deleted = stores.read_deleted(path, manifest)
        unknown = chosen[(chosen < 0) | (chosen >= manifest.next_id) | np.isin(chosen, deleted)]
        if len(unknown):
            shown = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
            raise UsageError(
                f"{len(unknown)} of {len(chosen)} ids are not in {path}: {shown}",
                remedy=f"give ids from 0 to {manifest.next_id - 1} that were not deleted",
            )
        if len(chosen):
            name = f"deleted-{manifest.sequence + 1:06d}.npy"
            with record.atomic(path / name) as file:
                np.save(file, np.union1d(deleted, chosen))
            _commit(path, replace(manifest, deleted=(name, mark(path / name))))
        return len(chosen)


def compact(path: Path) -> int:
    """Write all segments as one, without what was deleted; return the bytes that it freed.

    Memory: one list, and 8 bytes an id. Ids stay as they are. What is read is checked: a corrupt
    list or text raises FormatError naming it, and the store stays as it was.
    """
    with _changing(path), contextlib.closing(Store.open(path)) as store:
        manifest = store.manifest
        if len(store.segments) < 2 and not store.num_pending:
            return 0
        for error in store.verify_texts():
            raise error
        before = _folder_bytes(path)
        segments: tuple[SegmentInfo, ...] = ()
        with _new_segment(path, manifest) as folder:
            if store.num_vectors:
                first_id, end_id = manifest.segments[0].first_id, manifest.segments[-1].end_id
                info = _write_segment(folder, store.quantizer, _merged(store), first_id, end_id)
                if any(info.texts for info in manifest.segments):
                    alive = (p for p in store.passages() if not store.is_deleted(p.id))
                    texts.write(folder, alive, first_id=first_id, end_id=end_id)
                    info = _with_texts(info, folder)
                sync(folder)
                segments = (info,)
            _commit(path, replace(manifest, segments=segments))
        _sweep(path)
        return before - _folder_bytes(path)


def _merged(store: Store) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield each list of all segments together, without its deleted vectors."""
    for number in range(store.quantizer.num_lists):
        parts = [segment.read(number) for segment in store.segments]  # their ids ascend
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
    with locked(path, lambda name: _OURS.fullmatch(name) is not None):
        _sweep(path)
        try:
            yield
        finally:
            _sweep(path)


def _sweep(path: Path) -> None:
    """Delete what the manifest does not name: replaced, or left by a writer that failed or died."""
    if not (path / MANIFEST).exists():
        return
    manifest = read_manifest(path)
    named = {MANIFEST, QUANTIZER, *(info.name for info in manifest.segments)}
    if manifest.deleted:
        named.add(manifest.deleted[0])
    for file in path.iterdir():
        torn = re.match(r"\.(manifest\.json|quantizer\.bin|deleted-.*)\.", file.name)
        if torn or (_OURS.fullmatch(file.name) and file.name not in named):
            shutil.rmtree(file) if file.is_dir() else file.unlink()


def _folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
