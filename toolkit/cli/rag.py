"""toolkit rag: build an index of documents, search it, and answer from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit import units
from toolkit.cli import view
from toolkit.errors import UsageError

if TYPE_CHECKING:
    from rich.progress import Progress

    from toolkit.rag import Answer, Generator, Hit, Message, Retriever
    from toolkit.serve import LLM

app = typer.Typer(
    help="Build an index of documents and answer from it.",
    no_args_is_help=True,
    add_completion=False,
)

_Index = Annotated[Path, typer.Argument(metavar="INDEX", help="The folder of an index.")]
_Probes = Annotated[
    int | None, typer.Option("--nprobe", min=1, help="Lists to search. [default: the index's]")
]
_Threads = Annotated[
    int, typer.Option("--threads", min=1, help="Threads; 1 when anything else runs here.")
]


@app.command()
def build(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder, a text, HTML or JSONL file, datasets:NAME[:SPLIT], or python-docs.",
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
    nprobe: _Probes = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Index only the first passages.")] = None,
    words: Annotated[int, typer.Option(min=1, help="Words a passage has at most.")] = 75,
    overlap: Annotated[int, typer.Option(min=0, help="Words a passage shares with the next.")] = 0,
    text_field: Annotated[str, typer.Option(help="Field of JSONL and data sets to read.")] = "text",
    max_tokens: Annotated[
        int | None, typer.Option(min=3, help="Tokens of a passage to embed. [default: encoder's]")
    ] = None,
    query_prefix: Annotated[str, typer.Option(help='Before queries, e.g. "query: " (E5).')] = "",
    document_prefix: Annotated[
        str, typer.Option(help='Before passages, e.g. "passage: " (E5).')
    ] = "",
    seed: Annotated[int, typer.Option(help="Seed of the k-means that makes the lists.")] = 0,
    threads: _Threads = 1,
    as_json: view.Json = False,
) -> None:
    """Read documents, embed their passages, and write an index of them.

    An interrupted build goes on where it stopped when the same command is given again; an index
    that is already there is replaced only when the new one is complete.

    Example: toolkit rag build python-docs -o runs/python-docs
    """
    from toolkit.rag import Encoder, build_index, find_corpus

    corpus = find_corpus(source, text_field=text_field)
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
            corpus, output, loaded, num_lists=nlist, nprobe=nprobe, passage_words=words,
            overlap_words=overlap, limit=limit, seed=seed, threads=threads,
            progress=lambda stage, done, total: tell[stage](done, total),
        )  # fmt: skip
    skipped: dict[str, int] = {}
    for _, why in built.skipped:
        skipped[why] = skipped.get(why, 0) + 1
    speed = (built.num_passages - built.num_reused) / max(built.seconds["embedding"], 1e-9)
    embedded = units.format_seconds(built.seconds["embedding"])
    rows = [
        ("passages", f"{built.num_passages:,}"),
        ("lists", f"{built.num_lists:,}, of which a search looks into {built.nprobe:,}"),
        ("size", units.format_bytes(built.num_bytes)),
        ("reused", f"{built.num_reused:,} passages of an interrupted build"),
        ("cut short", f"{built.num_truncated:,} passages over {loaded.info.max_tokens} tokens"),
        ("embedding (measured)", f"{embedded}, {speed:.0f} passages/s on {threads} thread(s)"),
        *((f"not read: {why}", f"{count:,} files") for why, count in sorted(skipped.items())),
    ]
    view.emit(
        {**asdict(built), "path": str(built.path)},
        as_json=as_json,
        render=lambda: view.table(f"index {output}", ["what", "value"], rows),
    )


@app.command()
def search(
    index: _Index,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What to look for.")],
    *,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Passages to show.")] = 5,
    nprobe: _Probes = None,
    threads: _Threads = 1,
    as_json: view.Json = False,
) -> None:
    """Show the passages nearest to a query.

    Example: toolkit rag search runs/python-docs "how do I use the with statement"
    """
    retriever = _open(index, threads)
    hits = retriever.search(query, k, nprobe)
    view.emit(
        [{"score": hit.score, **asdict(hit.passage)} for hit in hits],
        as_json=as_json,
        render=lambda: view.table(
            f"nearest to {query}",
            ["score>", "place", "title", "text"],
            [
                (f"{hit.score:.3f}", hit.passage.place, hit.passage.title, _excerpt(hit))
                for hit in hits
            ],
        ),
    )


@app.command()
def ask(
    index: _Index,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to answer.")],
    *,
    url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server. [default: in this process]")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model to answer with. [default: smollm2-135m; with --url, its first]"),
    ] = None,
    pipeline: Annotated[str, typer.Option(help="plain or hyde.")] = "plain",
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Passages given to the model.")] = 4,
    nprobe: _Probes = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer has at most.")] = 160,
    min_score: Annotated[
        float | None,
        typer.Option(help="Cosine below which a passage is left out. [default: the encoder's]"),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds of silence a server may take.")] = 120.0,
    timeline: Annotated[
        Path | None, typer.Option(help="Also save the measured timeline here.")
    ] = None,
    threads: _Threads = 1,
    as_json: view.Json = False,
) -> None:
    """Answer a question from an index, streaming, then show the sources.

    Example: toolkit rag ask runs/python-docs "How do I use the with statement?"
    """
    from toolkit import rag

    retriever = _open(index, threads)
    generator = _generator(url, model, timeout)
    show: Callable[[str], None] | None = None
    if not as_json:
        show = lambda text: view.out.print(text, end="", markup=False, soft_wrap=True)  # noqa: E731
    answer = rag.ask(
        retriever, generator, question, pipeline=pipeline, k=k, nprobe=nprobe,
        max_tokens=max_tokens, min_score=min_score, on_text=show,
    )  # fmt: skip
    if timeline is not None:
        from toolkit.timeline import files

        files.save(answer.timeline, timeline)
    if show:
        view.out.print("\n")
    value = {**answer.to_json(), "root": retriever.index.manifest.corpus.root}
    view.emit(value, as_json=as_json, render=lambda: _sources(answer, retriever))


@app.command(name="eval")
def evaluate(
    index: _Index,
    *,
    queries: Annotated[
        Path | None, typer.Option(help="A file with a query a line. [default: sampled titles]")
    ] = None,
    num_queries: Annotated[int, typer.Option(min=1, help="Titles to sample.")] = 64,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Passages compared.")] = 10,
    threads: _Threads = 1,
    as_json: view.Json = False,
) -> None:
    """Measure recall against exact search, and search time, by the number of lists searched.

    Example: toolkit rag eval runs/python-docs --queries questions.txt
    """
    from toolkit.rag import evaluate as measure

    retriever = _open(index, threads)
    if queries is None:
        texts = measure.sample_titles(retriever, num_queries)
        kind = "sampled titles"
    else:
        try:
            texts = [line.strip() for line in queries.read_text().splitlines() if line.strip()]
        except OSError as error:
            raise UsageError(f"cannot read {queries}: {error.strerror}") from error
        kind = queries.name
    found = measure.recall(retriever, texts, k=k)
    chosen = retriever.index.manifest.nprobe
    view.emit(
        {"queries": kind, "num_queries": len(texts), "measured": [asdict(each) for each in found]},
        as_json=as_json,
        render=lambda: view.table(
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
    )  # fmt: skip


_STAGES = ("reading", "embedding", "training", "writing")


def _stages(bar: Progress, name: str) -> Callable[[int, int | None], None]:
    """Return what reports one stage; its bar appears when it begins."""
    tasks: list[Any] = []

    def tell(done: int, total: int | None) -> None:
        if not tasks:
            tasks.append(bar.add_task(name, total=total))
        bar.update(tasks[0], completed=done, total=total)

    return tell


def _open(index: Path, threads: int) -> Retriever:
    """Open an index, with the threads of the process set on purpose."""
    from toolkit.errors import require
    from toolkit.rag import Retriever
    from toolkit.rag.index import read_manifest

    read_manifest(index)  # a wrong folder is said before seconds of imports
    import torch

    torch.set_num_threads(threads)
    require("faiss", extra="rag").omp_set_num_threads(threads)
    return Retriever.open(index)


def _generator(url: str | None, model: str | None, timeout_s: float) -> Generator:
    if url is not None:
        from toolkit.rag import OpenAIGenerator

        return OpenAIGenerator(url, model=model, read_timeout_s=timeout_s)
    from toolkit.serve import LLM

    return _InProcess(LLM(model or "smollm2-135m"))


class _InProcess:
    """The serving engine in this process, as a Generator."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def stream(self, messages: Sequence[Message], *, max_tokens: int = 256) -> Iterator[str]:
        """Yield the reply in pieces, decoding greedily; a reader that stops aborts it."""
        from toolkit.serve import SamplingParams

        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        return self._llm.stream(messages, params)


def _sources(answer: Answer, retriever: Retriever) -> Any:
    """Show each passage the model was given, and how the answer cites it."""
    from rich.console import Group
    from rich.text import Text

    rows = []
    for number, hit in enumerate(answer.hits, start=1):
        cites = [each for each in answer.citations if each.number == number]
        how = ", ".join(sorted({each.how for each in cites}))
        best = f"{max(each.support for each in cites):.0%}" if cites else ""
        row = (number, how or "-", best, f"{hit.score:.3f}", hit.passage.place)
        rows.append((*row, hit.passage.title))
    timings = ", ".join(
        f"{name.removesuffix('_s')} {units.format_seconds(value)}"
        for name, value in answer.timings.items()
    )
    parts: list[Any] = []
    if rows:
        parts.append(
            view.table("sources", ["no>", "cited", "words held>", "score>", "place", "title"], rows)
        )
    root = retriever.index.manifest.corpus.root
    if rows and root:
        parts.append(Text(f"places are below {root}"))
    if answer.unsupported:
        parts.append(Text(f"{len(answer.unsupported)} sentence(s) that no passage supports"))
    parts.append(Text(f"measured: {timings}"))
    return Group(*parts)


def _excerpt(hit: Hit) -> str:
    words = " ".join(hit.passage.text.split())
    return words if len(words) <= 160 else words[:157] + "..."
