"""toolkit rag search and ask: passages, and answers that rest on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit import units
from toolkit.cli import view
from toolkit.cli.rag import options

if TYPE_CHECKING:
    from toolkit.rag import Answer, Generator, Hit, Message, Retriever
    from toolkit.serve import LLM

PIPELINES = "plain, hyde, sub-question, iterative, irg, flare, self-rag"


def search(
    index: options.Index,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What to look for.")],
    *,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Passages to show.")] = 5,
    nprobe: options.Probes = None,
    where: options.Where = None,
    memory: options.Memory = options.MEMORY,
    threads: options.Threads = 1,
    as_json: view.Json = False,
) -> None:
    """Show the passages nearest to a query.

    Example: toolkit rag search runs/python-docs "how do I use the with statement"
    """
    retriever = options.open_index(index, threads, memory)
    hits = retriever.search(query, k, nprobe, where=where or ())
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


def ask(
    index: options.Index,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to answer.")],
    *,
    url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server. [default: in this process]")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model to answer with. [default: smollm2-135m; with --url, its first]"),
    ] = None,
    pipeline: Annotated[str, typer.Option(help=f"One of {PIPELINES}.")] = "plain",
    lookahead: Annotated[
        str, typer.Option(help="progressive, question or off: lists fetched while text comes.")
    ] = "progressive",
    hybrid: Annotated[
        bool, typer.Option("--hybrid", help="Search by words (BM25) as well, fused by rank.")
    ] = False,
    recording: Annotated[
        Path | None, typer.Option(help="Also save the rounds here, to be played back.")
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Play recorded rounds instead of asking a model.")
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Passages given to the model.")] = 4,
    nprobe: options.Probes = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer has at most.")] = 160,
    min_score: Annotated[
        float | None,
        typer.Option(help="Cosine below which a passage is left out. [default: the encoder's]"),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds of silence a server may take.")] = 120.0,
    timeline: Annotated[
        Path | None, typer.Option(help="Also save the measured timeline here.")
    ] = None,
    where: options.Where = None,
    memory: options.Memory = options.MEMORY,
    threads: options.Threads = 1,
    as_json: view.Json = False,
) -> None:
    """Answer a question from an index, streaming, then show the sources.

    Example: toolkit rag ask runs/python-docs "How do I use the with statement?"
    """
    from toolkit import rag

    retriever = options.open_index(index, threads, memory)
    if replay is not None:
        played = rag.Recording.load(replay)
        speaker: Generator = rag.Replay(played)
        pipeline = played.pipeline
    else:
        speaker = generator(url, model, timeout)
    words = rag.Lexical.open(retriever) if hybrid else None
    show: Callable[[str], None] | None = None
    if not as_json:
        show = lambda text: view.out.print(text, end="", markup=False, soft_wrap=True)  # noqa: E731
    answer = rag.ask(
        retriever, speaker, question, pipeline=pipeline, k=k, nprobe=nprobe,
        max_tokens=max_tokens, min_score=min_score, lookahead=rag.find_mode(lookahead),
        lexical=words, where=where or (), on_text=show,
    )  # fmt: skip
    if recording is not None:
        answer.recording.save(recording)
    if timeline is not None:
        from toolkit.timeline import files

        files.save(answer.timeline, timeline)
    if show:
        view.out.print("\n")
    value = answer.to_json()
    view.emit(value, as_json=as_json, render=lambda: _sources(answer, retriever))


def generator(url: str | None, model: str | None, timeout_s: float) -> Generator:
    """Return what writes: a server at `url`, or a model in this process."""
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
    roots = [retriever.store.corpus(hit.passage.id) for hit in answer.hits]
    for root in dict.fromkeys(of.root for of in roots if of and of.root):
        parts.append(Text(f"places are below {root}"))
    if answer.unsupported:
        parts.append(Text(f"{len(answer.unsupported)} sentence(s) that no passage supports"))
    parts.append(Text(f"measured: {timings}"))
    return Group(*parts)


def _excerpt(hit: Hit) -> str:
    words = " ".join(hit.passage.text.split())
    return words if len(words) <= 160 else words[:157] + "..."
