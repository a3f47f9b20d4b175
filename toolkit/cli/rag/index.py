"""toolkit rag build, add, delete, compact: make an index of documents and keep it up to date."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit import units
from toolkit.cli import view
from toolkit.cli.rag import options

if TYPE_CHECKING:
    from rich.progress import Progress


def build(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder, a text, HTML, PDF or JSONL file, datasets:NAME, or python-docs.",
        ),
    ],
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="The index's folder.")],
    encoder: Annotated[
        str, typer.Option(help="minilm-l6, a Hugging Face folder, or a hub id.")
    ] = "minilm-l6",
    nlist: Annotated[
        int | None, typer.Option(min=1, help="Lists to divide into. [default: from the size]")
    ] = None,
    nprobe: options.Probes = None,
    encoding: Annotated[
        str, typer.Option(help="f32, f16 (half the bytes a search reads) or sq8 (a quarter).")
    ] = "f32",
    limit: Annotated[int | None, typer.Option(min=1, help="Index only the first passages.")] = None,
    words: Annotated[int, typer.Option(min=1, help="Words a passage has at most.")] = 75,
    overlap: Annotated[int, typer.Option(min=0, help="Words a passage shares with the next.")] = 0,
    text_field: Annotated[str, typer.Option(help="Field of JSONL and data sets to read.")] = "text",
    meta_field: Annotated[
        list[str] | None, typer.Option(help="Field to keep for --where. May repeat.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=3, help="Tokens of a passage to embed. [default: encoder's]")
    ] = None,
    query_prefix: Annotated[str, typer.Option(help='Before queries, e.g. "query: " (E5).')] = "",
    document_prefix: Annotated[
        str, typer.Option(help='Before passages, e.g. "passage: " (E5).')
    ] = "",
    seed: Annotated[int, typer.Option(help="Seed of the k-means that makes the lists.")] = 0,
    threads: options.Threads = 1,
    as_json: view.Json = False,
) -> None:
    """Read documents, embed their passages, and write an index of them.

    An interrupted build goes on where it stopped when the same command is given again; an index
    that is already there is replaced only when the new one is complete.

    Example: toolkit rag build python-docs -o runs/python-docs
    """
    from toolkit.rag import Encoder, build_index, find_corpus
    from toolkit.rag.quantizer import find_encoding

    chosen = find_encoding(encoding)
    corpus = find_corpus(source, text_field=text_field, meta_fields=meta_field or ())
    with view.progress(quiet=as_json) as bar:
        loaded = Encoder.load(
            encoder,
            max_tokens=max_tokens,
            query_prefix=query_prefix,
            document_prefix=document_prefix,
            fetching=_stages(bar, "fetching the encoder"),
        )
        tell = {name: _stages(bar, name) for name in _STAGES}
        built = build_index(
            corpus, output, loaded, num_lists=nlist, nprobe=nprobe, encoding=chosen,
            passage_words=words, overlap_words=overlap, limit=limit, seed=seed, threads=threads,
            progress=lambda stage, done, total: tell[stage](done, total),
        )  # fmt: skip
    speed = (built.num_passages - built.num_reused) / max(built.seconds["embedding"], 1e-9)
    embedded = units.format_seconds(built.seconds["embedding"])
    rows = [
        ("passages", f"{built.num_passages:,}"),
        ("lists", f"{built.num_lists:,}, of which a search looks into {built.nprobe:,}"),
        ("size", f"{units.format_bytes(built.num_bytes)}, vectors as {built.encoding}"),
        ("reused", f"{built.num_reused:,} passages of an interrupted build"),
        ("cut short", f"{built.num_truncated:,} passages over {loaded.info.max_tokens} tokens"),
        ("embedding (measured)", f"{embedded}, {speed:.0f} passages/s on {threads} thread(s)"),
        *_skipped(built.skipped),
    ]
    view.emit(
        {**asdict(built), "path": str(built.path)},
        as_json=as_json,
        render=lambda: view.table(f"index {output}", ["what", "value"], rows),
    )


def add(
    index: options.Index,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="What `build` takes.")],
    *,
    keep: Annotated[
        bool, typer.Option("--keep", help="Delete nothing that SOURCE no longer holds.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first passages.")] = None,
    text_field: Annotated[str, typer.Option(help="Field of JSONL and data sets to read.")] = "text",
    meta_field: Annotated[
        list[str] | None, typer.Option(help="Field to keep for --where. May repeat.")
    ] = None,
    threads: options.Threads = 1,
    as_json: view.Json = False,
) -> None:
    """Bring an index up to date with a source: one it holds, or a new one.

    What is new or changed in SOURCE is embedded and added; what it no longer holds is deleted;
    other sources stay. Small additions are merged now and then. Interrupted, it goes on where it
    stopped.

    Example: toolkit rag add runs/docs docs/
    """
    from toolkit.rag import Encoder, find_corpus, update_index
    from toolkit.rag.store import read_manifest

    manifest = read_manifest(index)
    corpus = find_corpus(source, text_field=text_field, meta_fields=meta_field or ())
    with view.progress(quiet=as_json) as bar:
        tell = {name: _stages(bar, name) for name in _STAGES}
        done = update_index(
            corpus, index, Encoder.matching(options.recipe(manifest, index).encoder), keep=keep,
            limit=limit, threads=threads,
            progress=lambda stage, done, total: tell[stage](done, total),
        )  # fmt: skip
    rows = [
        ("added", f"{done.num_added:,} passages"),
        ("unchanged", f"{done.num_unchanged:,} passages"),
        ("deleted", f"{done.num_deleted:,} passages"),
        ("now in the index", f"{done.num_passages:,} passages"),
        ("reused", f"{done.num_reused:,} passages of an interrupted run"),
        ("freed by compaction", units.format_bytes(done.freed_bytes)),
        *_skipped(done.skipped),
    ]
    view.emit(
        {**asdict(done), "path": str(done.path)},
        as_json=as_json,
        render=lambda: view.table(f"index {index}", ["what", "value"], rows),
    )


def delete(
    index: options.Index,
    patterns: Annotated[
        list[str], typer.Argument(metavar="PATTERN...", help="Sources, e.g. 'old/*.md'.")
    ],
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: view.Json = False,
) -> None:
    """Delete the passages of sources, by name or pattern; no search finds them afterwards.

    Their bytes go when enough has been deleted, or with `compact`.

    Example: toolkit rag delete runs/docs "drafts/*"
    """
    from toolkit.rag import changes
    from toolkit.rag.store import Store

    store = Store.open(index)
    ids = store.of_sources(patterns)
    store.close()
    if not dry_run:
        changes.delete(index, ids)
        changes.tidy(index)
    said = "would delete" if dry_run else "deleted"
    view.emit(
        {"index": str(index), "num_deleted": len(ids), "dry_run": dry_run},
        as_json=as_json,
        render=lambda: f"{said} {len(ids):,} passages of {index}",
    )


def compact(index: options.Index, *, as_json: view.Json = False) -> None:
    """Write an index as one segment, without what was deleted; every byte is checked.

    Example: toolkit rag compact runs/docs
    """
    from toolkit.rag import changes

    freed_bytes = changes.compact(index)
    view.emit(
        {"index": str(index), "freed_bytes": freed_bytes},
        as_json=as_json,
        render=lambda: f"freed {units.format_bytes(freed_bytes)} in {index}",
    )


def _skipped(skipped: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    counts: dict[str, int] = {}
    for _, why in skipped:
        counts[why] = counts.get(why, 0) + 1
    return [(f"not read: {why}", f"{count:,} files") for why, count in sorted(counts.items())]


_STAGES = ("reading", "embedding", "training", "writing")


def _stages(bar: Progress, name: str) -> Callable[[int, int | None], None]:
    """Return what reports one stage; its bar appears when it begins."""
    tasks: list[Any] = []

    def tell(done: int, total: int | None) -> None:
        if not tasks:
            tasks.append(bar.add_task(name, total=total))
        bar.update(tasks[0], completed=done, total=total)

    return tell
