"""Build an index: read -> embed -> train -> write; and bring one up to date with its source.

What was embedded lies in INDEX/building/ until the commit. Killed at any moment, the next run of
the same command takes up the shards that are done; the index that was there before serves until the
new manifest replaces the old one.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from toolkit.errors import UsageError, require
from toolkit.rag import changes, folder, passages
from toolkit.rag.corpus import PASSAGE_WORDS, Corpus, Passage
from toolkit.rag.corpus import passages as cut
from toolkit.rag.embed import Encoder, ShardStore, shards
from toolkit.rag.quantizer import Encoding, Quantizer
from toolkit.rag.store import BUILDING, Recipe, Store, read_manifest

Stage = Literal["reading", "embedding", "training", "writing"]
# Called with (stage, done, total); total is None while it is not known.
Progress = Callable[[Stage, int, int | None], None]

SHARD_PASSAGES = 1024  # what a killed build loses at most, about half a minute on one core
_SAMPLE_PER_LIST = 256  # FAISS's own limit: more points do not move centroids


@dataclass(frozen=True)
class Built:
    """What a build made, and how long it took (measured)."""

    path: Path
    num_passages: int
    num_lists: int
    nprobe: int
    encoding: Encoding
    num_reused: int  # passages whose vectors an interrupted build had left
    num_truncated: int  # passages longer than the encoder reads, among those embedded now
    num_bytes: int
    skipped: tuple[tuple[str, str], ...]  # (source, why it was not read)
    seconds: dict[Stage, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Updated:
    """What bringing an index up to date did (measured)."""

    path: Path
    num_added: int
    num_unchanged: int
    num_deleted: int
    num_passages: int  # in the index now
    num_reused: int
    freed_bytes: int  # by compaction, when there was enough to compact
    skipped: tuple[tuple[str, str], ...]
    seconds: dict[Stage, float] = field(default_factory=dict)


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


def build_index(
    corpus: Corpus,
    path: Path,
    encoder: Encoder,
    *,
    num_lists: int | None = None,
    nprobe: int | None = None,
    encoding: Encoding = "f32",
    passage_words: int = PASSAGE_WORDS,
    overlap_words: int = 0,
    limit: int | None = None,
    seed: int = 0,
    threads: int = 1,
    shard_passages: int = SHARD_PASSAGES,
    progress: Progress | None = None,
) -> Built:
    """Build the index at `path`, replacing the one that is there only when it is complete.

    `threads` is set for torch and FAISS alike; more than one helps only on an idle machine.
    Memory: one shard, the sample that centroids are trained on (256 vectors a list), a quarter of a
    GiB to sort vectors into lists, 8 bytes a passage, and a digest a passage to drop duplicates.
    Raises UsageError for an empty corpus, a busy or foreign folder, and impossible settings.
    """
    tell = progress or (lambda stage, done, total: None)
    seconds: dict[Stage, float] = {}
    skipped: list[tuple[str, str]] = []
    with _staged(path, threads) as staged:
        with _timed(seconds, "reading"):
            documents = corpus.documents(lambda source, why: skipped.append((source, why)))
            read = cut(documents, words=passage_words, overlap=overlap_words, limit=limit)
            num_passages = _write(read, staged, tell, limit)
        if num_passages == 0:
            raise _nothing(corpus, skipped)
        wanted = num_lists or default_num_lists(num_passages)
        if not 1 <= wanted <= num_passages:
            raise UsageError(f"{wanted} lists for {num_passages} passages", remedy="ask for fewer")
        probes = nprobe or default_nprobe(wanted)
        if not 1 <= probes <= wanted:
            raise UsageError(f"nprobe {probes} of {wanted} lists", remedy=f"use 1 to {wanted}")
        with _timed(seconds, "embedding"):
            store = ShardStore(staged / "shards", encoder)
            files = _embed(staged, store, num_passages, shard_passages, tell)
        with _timed(seconds, "training"):
            tell("training", 0, 1)
            sample = _sample(files, num_passages, wanted * _SAMPLE_PER_LIST, seed)
            quantizer = Quantizer.train(sample, wanted, encoding, seed=seed)
            del sample
            tell("training", 1, 1)
        with _timed(seconds, "writing"), contextlib.closing(passages.PassageFile(staged)) as text:
            changes.rebuild(
                path, quantizer, _vectors(files, tell), text,
                recipe=Recipe(encoder.info, passage_words, overlap_words, probes),
                corpus=(corpus.name, str(corpus.root) if corpus.root else None),
            )  # fmt: skip
            tell("writing", len(files), len(files))
    return Built(
        path=path,
        num_passages=num_passages,
        num_lists=wanted,
        nprobe=probes,
        encoding=encoding,
        num_reused=store.num_reused,
        num_truncated=encoder.num_truncated,
        num_bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        skipped=tuple(skipped),
        seconds=seconds,
    )


def update_index(
    corpus: Corpus,
    path: Path,
    encoder: Encoder,
    *,
    keep: bool = False,
    limit: int | None = None,
    threads: int = 1,
    shard_passages: int = SHARD_PASSAGES,
    progress: Progress | None = None,
) -> Updated:
    """Bring the index at `path` up to date with a corpus, an old or a new one of it.

    Passages that are new or moved are embedded and added, and those of the same corpus (by name)
    that it no longer holds are deleted, unless `keep`: in one commit. Other corpora stay, and what
    one of them says is not added again. Then small segments are compacted (`changes.tidy`).
    `encoder` must be the index's. Raises UsageError when nothing can be read of the corpus.
    """
    tell = progress or (lambda stage, done, total: None)
    seconds: dict[Stage, float] = {}
    skipped: list[tuple[str, str]] = []
    recipe = read_manifest(path).recipe
    if recipe is None or recipe.encoder != encoder.info:
        raise UsageError(
            f"{path} was not built with the encoder {encoder.info.ref}",
            remedy="use its own (Encoder.matching)",
        )
    with _staged(path, threads) as staged:
        with _timed(seconds, "reading"):
            with contextlib.closing(Store.open(path)) as store:
                mine, others = _known(store, corpus)
            documents = corpus.documents(lambda source, why: skipped.append((source, why)))
            read = cut(
                documents, words=recipe.passage_words, overlap=recipe.overlap_words, limit=limit
            )
            found: set[bytes] = set()
            new = (p for p in read if _is_new(p, mine, others, found))
            num_passages = _write(new, staged, tell, limit)
        if not num_passages and not found:
            raise _nothing(corpus, skipped)
        gone = [] if keep else [passage_id for key, passage_id in mine.items() if key not in found]
        with _timed(seconds, "embedding"):
            made = ShardStore(staged / "shards", encoder)
            files = _embed(staged, made, num_passages, shard_passages, tell)
        with _timed(seconds, "writing"):
            with contextlib.closing(passages.PassageFile(staged)) as text:
                changes.add(
                    path, _vectors(files, tell), text, replacing=gone,
                    corpus=(corpus.name, str(corpus.root) if corpus.root else None),
                )  # fmt: skip
            tell("writing", len(files), len(files))
    # What was embedded is in the index now; compaction may be killed without losing it.
    freed_bytes = changes.tidy(path)
    with contextlib.closing(Store.open(path)) as store:
        total = store.num_vectors
    return Updated(
        path, num_passages, len(found), len(gone), total, made.num_reused, freed_bytes,
        tuple(skipped), seconds,
    )  # fmt: skip


def _known(store: Store, corpus: Corpus) -> tuple[dict[bytes, int], set[bytes]]:
    """Return the places of this corpus's passages with their ids, and the texts of the others."""
    mine: dict[bytes, int] = {}
    others: set[bytes] = set()
    for passage in store.passages():
        if not store.is_deleted(passage.id):
            of = store.corpus(passage.id)
            if of and of.name == corpus.name:
                mine[passage.digest(place=True)] = passage.id
            else:
                others.add(passage.digest())
    return mine, others


def _is_new(
    passage: Passage, mine: dict[bytes, int], others: set[bytes], found: set[bytes]
) -> bool:
    key = passage.digest(place=True)
    if key in mine:
        found.add(key)
        return False
    return passage.digest() not in others


@contextlib.contextmanager
def _staged(path: Path, threads: int) -> Iterator[Path]:
    """Hold the index as its writer, with threads set; yield the folder of what is not done yet."""
    import torch

    faiss = require("faiss", extra="rag")  # before a folder is made for nothing
    with folder.locked(path, changes.ours):
        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(threads)
        staged = path / BUILDING
        staged.mkdir(exist_ok=True)
        yield staged
        shutil.rmtree(staged)


def _nothing(corpus: Corpus, skipped: list[tuple[str, str]]) -> UsageError:
    reason = f"; {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
    return UsageError(
        f"nothing to index in {corpus.name}: no passage of text was found",
        remedy=f"{len(skipped)} files were not readable as text{reason}" if skipped else None,
    )


def _write(read: Iterable[Passage], staged: Path, tell: Progress, limit: int | None) -> int:
    """Write the corpus's passages, numbered from 0; return their number."""
    done = 0

    def count(new: int) -> None:
        nonlocal done
        done += new
        if done % 100 == 0:
            tell("reading", done, limit)

    num_passages = passages.write(staged, passages.numbered(read), progress=count)
    tell("reading", num_passages, num_passages)
    return num_passages


def _embed(
    staged: Path, store: ShardStore, num_passages: int, size: int, tell: Progress
) -> list[Path]:
    """Return the files of vectors, in passage order, computing those that are not there yet."""
    done = 0

    def count(new: int) -> None:
        nonlocal done
        done += new
        tell("embedding", done, num_passages)

    text = passages.PassageFile(staged)
    with contextlib.closing(text):
        embedded = (passage.embedded for passage in text)
        return [store.embed(shard, progress=count) for shard in shards(embedded, size)]


def _vectors(files: list[Path], tell: Progress) -> Iterator[np.ndarray]:
    for done, file in enumerate(files):
        tell("writing", done, len(files))
        yield np.load(file)


def _sample(files: list[Path], num_vectors: int, size: int, seed: int) -> np.ndarray:
    """Return at most `size` vectors drawn without replacement; the seed decides which."""
    chosen = np.arange(num_vectors)
    if size < num_vectors:
        drawn = np.random.default_rng(seed).choice(num_vectors, size, replace=False)
        chosen = np.sort(drawn)
    parts: list[Any] = []
    first = 0
    for file in files:
        vectors = np.load(file, mmap_mode="r")
        inside = chosen[(chosen >= first) & (chosen < first + len(vectors))]
        parts.append(vectors[inside - first])
        first += len(vectors)
    return np.concatenate(parts)


@contextlib.contextmanager
def _timed(seconds: dict[Stage, float], stage: Stage) -> Iterator[None]:
    start_s = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start_s
