"""toolkit rag eval and advise: what an index finds, and how it should be set."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group

from toolkit import units
from toolkit.cli import view
from toolkit.cli.rag import options
from toolkit.errors import UsageError

if TYPE_CHECKING:
    from toolkit.rag import Hit, Retriever
    from toolkit.rag.evaluate import Quality


def evaluate(
    index: options.Index,
    *,
    queries: Annotated[
        Path | None, typer.Option(help="A file with a query a line. [default: sampled titles]")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help='Also: JSONL of {"query": ..., "relevant": [titles]}, for nDCG.'),
    ] = None,
    num_queries: Annotated[int, typer.Option(min=1, help="Titles or labels to sample.")] = 64,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Passages compared.")] = 10,
    memory: options.Memory = options.MEMORY,
    threads: options.Threads = 1,
    as_json: view.Json = False,
) -> None:
    """Measure recall against exact search, and search time, by the number of lists searched.

    Example: toolkit rag eval runs/python-docs --queries questions.txt
    """
    from toolkit.rag import evaluate as measure

    retriever = options.open_index(index, threads, memory)
    texts, kind = _queries(retriever, queries, num_queries)
    found = measure.recall(retriever, texts, k=k)
    chosen = retriever.probes()
    judged = _judged(retriever, labels, num_queries, k) if labels else {}
    view.emit(
        {
            "queries": kind,
            "num_queries": len(texts),
            "measured": [asdict(each) for each in found],
            "labelled": {name: asdict(each) for name, each in judged.items()},
        },
        as_json=as_json,
        render=lambda: Group(
            view.table(
                f"measured on {len(texts)} queries ({kind})",
                ["nprobe>", f"recall@{k}>", "vectors scanned>", "search, median>", ""],
                [
                    (
                        each.nprobe, f"{each.recall:.3f}", f"{each.scanned:.1%}",
                        units.format_seconds(each.search_s),
                        "default" if each.nprobe == chosen else "",
                    )
                    for each in found
                ],
            ),
            *(
                view.table(
                    f"measured on {each.num_queries} labelled queries, {name}",
                    [f"nDCG@{k}>", f"recall@{k}>", f"one right in {k}>"],
                    [(f"{each.ndcg:.3f}", f"{each.recall:.3f}", f"{each.success:.3f}")],
                )
                for name, each in judged.items()
            ),
        ),
    )  # fmt: skip


def _judged(
    retriever: Retriever, path: Path, num_queries: int, k: int
) -> dict[str, Quality]:  # fmt: skip
    """Return the quality of search by vectors, by words, and by both."""
    import random

    from toolkit.rag import Lexical
    from toolkit.rag import evaluate as measure
    from toolkit.rag.fusion import fuse

    labels = measure.read_labels(path)
    labels = random.Random(0).sample(labels, min(num_queries, len(labels)))
    words = Lexical.open(retriever)

    def both(query: str, most: int) -> list[Hit]:
        deep = 5 * most
        return fuse([retriever.search(query, deep), words.search(query, deep)], most)

    every = retriever.num_lists
    return {
        "vectors": measure.quality(retriever, labels, retriever.search, k=k),
        "vectors, all lists": measure.quality(
            retriever, labels, lambda query, most: retriever.search(query, most, every), k=k
        ),
        "words (BM25)": measure.quality(retriever, labels, words.search, k=k),
        "both, fused": measure.quality(retriever, labels, both, k=k),
    }


def advise(
    index: options.Index,
    *,
    queries: Annotated[
        Path | None, typer.Option(help="A file with a query a line. [default: sampled titles]")
    ] = None,
    num_queries: Annotated[int, typer.Option(min=1, help="Titles to sample.")] = 64,
    target: Annotated[float, typer.Option(help="Recall@10 wanted, of exact search.")] = 0.95,
    url: Annotated[
        str | None, typer.Option(help="The server that will generate, to measure its pace.")
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Keep the nprobe found as default.")] = False,
    memory: options.Memory = options.MEMORY,
    threads: options.Threads = 1,
    as_json: view.Json = False,
) -> None:
    """Measure an index and this machine; say how many lists, probes and bytes of memory to give it.

    Example: toolkit rag advise runs/docs --queries questions.txt --url http://localhost:8000
    """
    from toolkit.rag import OpenAIGenerator, changes
    from toolkit.rag.advise import advise as measure

    retriever = options.open_index(index, threads, memory)
    texts, kind = _queries(retriever, queries, num_queries)
    found = measure(
        retriever, texts, target=target, generator=OpenAIGenerator(url) if url else None
    )  # fmt: skip
    if save:
        changes.set_nprobe(index, found.nprobe)
    rows = [
        ("vectors in lists", "", f"{found.num_vectors:,} in {found.num_lists:,}"),
        ("a list, median", "", units.format_bytes(found.list_bytes)),
        ("the index", "", units.format_bytes(found.index_bytes)),
        ("direct reads of lists", "", units.format_rate(found.disk_bytes_per_s)),
        *((f"recall@10, {each.nprobe} lists", "", f"{each.recall:.3f}") for each in found.recalls),
        ("a token", "", units.format_seconds(found.token_s) if found.token_s else "-"),
        ("bytes of a search", "", units.format_bytes(found.probed_bytes)),
        ("reading them, cold", units.format_seconds(found.cold_s), ""),
        ("64 tokens", units.format_seconds(found.window_s) if found.window_s else "-", ""),
    ]
    view.emit(
        {**asdict(found), "advice": found.advice, "queries": kind, "saved": save},
        as_json=as_json,
        render=lambda: Group(
            view.table(f"{index}, {len(texts)} queries ({kind})",
                       ["what", "predicted>", "measured>"], rows),
            *(f"- {each}" for each in found.advice),
        ),
    )  # fmt: skip


def _queries(
    retriever: Retriever, queries: Path | None, num_queries: int
) -> tuple[list[str], str]:  # fmt: skip
    """Return queries from a file, or sampled titles, and which of them they are."""
    from toolkit.rag import evaluate

    if queries is None:
        return evaluate.sample_titles(retriever, num_queries), "sampled titles"
    try:
        texts = [line.strip() for line in queries.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise UsageError(f"cannot read {queries}: {error.strerror}") from error
    return texts, queries.name
