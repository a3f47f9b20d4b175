"""Build an index: read -> embed -> train -> write, resumable until the commit.

A build leaves its passages and embedded shards in INDEX/building/. Killed at any moment, the next
build of the same index takes up the shards that are done; the index that was there before serves
until the new manifest replaces the old one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from toolkit.errors import FormatError, UsageError, require
from toolkit.rag import folder, index, passages
from toolkit.rag.corpus import PASSAGE_WORDS, Corpus
from toolkit.rag.corpus import passages as cut
from toolkit.rag.embed import Encoder, ShardStore, shards

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
    num_reused: int  # passages whose vectors an interrupted build had left
    num_truncated: int  # passages longer than the encoder reads, among those embedded now
    num_bytes: int
    skipped: tuple[tuple[str, str], ...]  # (source, why it was not read)
    seconds: dict[Stage, float] = field(default_factory=dict)


def build_index(
    corpus: Corpus,
    path: Path,
    encoder: Encoder,
    *,
    num_lists: int | None = None,
    nprobe: int | None = None,
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
    Memory: one shard of text and the FAISS index itself (4 bytes a dimension and passage).
    Raises UsageError for an empty corpus, a busy or foreign folder, and impossible settings.
    """
    import torch

    faiss = require("faiss", extra="rag")
    tell = progress or (lambda stage, done, total: None)
    seconds: dict[Stage, float] = {}
    with folder.locked(path, _ours):
        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(threads)
        staged = path / index.BUILDING
        staged.mkdir(exist_ok=True)
        skipped: list[tuple[str, str]] = []

        with _timed(seconds, "reading"):
            num_passages = _read(
                corpus, staged, skipped, tell,
                words=passage_words, overlap=overlap_words, limit=limit,
            )  # fmt: skip
        if num_passages == 0:
            raise UsageError(
                f"nothing to index in {corpus.name}: no passage of text was found",
                remedy=f"{len(skipped)} files were not readable as text" if skipped else None,
            )
        wanted = num_lists or index.default_num_lists(num_passages)
        if not 1 <= wanted <= num_passages:
            raise UsageError(f"{wanted} lists for {num_passages} passages", remedy="ask for fewer")
        probes = nprobe or index.default_nprobe(wanted)
        if not 1 <= probes <= wanted:
            raise UsageError(f"nprobe {probes} of {wanted} lists", remedy=f"use 1 to {wanted}")

        with _timed(seconds, "embedding"):
            store = ShardStore(staged / "shards", encoder)
            files = _embed(staged, store, num_passages, shard_passages, tell)
        with _timed(seconds, "training"):
            tell("training", 0, 1)
            sample = _sample(files, num_passages, wanted * _SAMPLE_PER_LIST, seed)
            lists = index.train(sample, wanted, seed=seed)
            tell("training", 1, 1)
        with _timed(seconds, "writing"):
            for done, file in enumerate(files):
                tell("writing", done, len(files))
                lists.add(np.load(file))
            index.write_lists(lists, staged)
            manifest = index.Manifest(
                generation=_next_generation(path),
                corpus=index.CorpusInfo(
                    corpus.name, str(corpus.root) if corpus.root else None,
                    passage_words, overlap_words, limit,
                ),
                encoder=encoder.info,
                num_passages=num_passages,
                num_lists=wanted,
                nprobe=probes,
                seed=seed,
                files={name: index.mark(staged / name) for name in index.FILES},
            )  # fmt: skip
            index.commit(path, staged, manifest)
            tell("writing", len(files), len(files))
    return Built(
        path=path,
        num_passages=num_passages,
        num_lists=wanted,
        nprobe=probes,
        num_reused=store.num_reused,
        num_truncated=encoder.num_truncated,
        num_bytes=sum(mark.num_bytes for mark in manifest.files.values()),
        skipped=tuple(skipped),
        seconds=seconds,
    )


def _read(
    corpus: Corpus,
    staged: Path,
    skipped: list[tuple[str, str]],
    tell: Progress,
    **how: Any,
) -> int:
    """Write the corpus's passages; return their number."""
    done = 0

    def count(new: int) -> None:
        nonlocal done
        done += new
        if done % 100 == 0:
            tell("reading", done, how["limit"])

    documents = corpus.documents(lambda source, why: skipped.append((source, why)))
    num_passages = passages.write(staged, cut(documents, **how), progress=count)
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


def _sample(files: list[Path], num_vectors: int, size: int, seed: int) -> np.ndarray:
    """Return at most `size` vectors drawn without replacement; the seed decides which."""
    chosen = np.arange(num_vectors)
    if size < num_vectors:
        drawn = np.random.default_rng(seed).choice(num_vectors, size, replace=False)
        chosen = np.sort(drawn)
    parts, first = [], 0
    for file in files:
        vectors = np.load(file, mmap_mode="r")
        inside = chosen[(chosen >= first) & (chosen < first + len(vectors))]
        parts.append(vectors[inside - first])
        first += len(vectors)
    return np.concatenate(parts)


def _next_generation(path: Path) -> str:
    try:
        current = index.read_manifest(path).generation
    except (UsageError, FormatError):
        current = "g-000000"  # none yet, or one that can only be replaced
    return f"g-{int(current.removeprefix('g-')) + 1:06d}"


@contextlib.contextmanager
def _timed(seconds: dict[Stage, float], stage: Stage) -> Iterator[None]:
    start_s = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start_s


def _ours(name: str) -> bool:
    return name in (index.MANIFEST, index.BUILDING) or name.startswith("g-")
