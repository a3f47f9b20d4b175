"""toolkit rag bench: what lookahead is worth on an index, against FAISS and against all in RAM."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit import units
from toolkit.cli import view
from toolkit.cli.rag import ask, options
from toolkit.errors import UsageError

if TYPE_CHECKING:
    from toolkit.rag import Retriever
    from toolkit.rag.bench import Arm, Run, Summary


def bench(
    index: options.Index,
    *,
    queries: Annotated[Path, typer.Option(help="A file with a question a line, 20 or more.")],
    url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server. [default: in this process]")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model to generate with.")] = None,
    pipeline: Annotated[str, typer.Option(help=f"One of {ask.PIPELINES}.")] = "hyde",
    arms: Annotated[
        str, typer.Option(help="Which of faiss,off,question,progressive,ram to compare.")
    ] = "faiss,off,question,progressive,ram",
    num_queries: Annotated[int, typer.Option(min=1, help="Take the first so many.")] = 20,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Passages a search returns.")] = 4,
    nprobe: options.Probes = None,
    multiple: Annotated[
        float, typer.Option(help="Lookahead reads at most so many times what a search does.")
    ] = 2.0,
    answer_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of the answer; 0 ends with the passages.")
    ] = 32,
    faiss_folder: Annotated[
        Path | None, typer.Option(help="Where FAISS's copy goes. [default: INDEX-faiss]")
    ] = None,
    memory: options.Memory = options.MEMORY,
    threads: options.Threads = 1,
    as_json: view.Json = False,
) -> None:
    """Compare FAISS on disk, this engine without and with lookahead, and all in RAM: cold, ABBA.

    Every question is generated for and searched in every arm, and all must find the same passages.

    Example: toolkit rag bench runs/docs --queries questions.txt --url http://localhost:8000
    """
    from toolkit.rag import bench as benching

    texts = _questions(queries)[:num_queries]
    retriever = options.open_index(index, threads, memory)
    chosen = benching.find_arms(arms)
    folder = faiss_folder or index.with_name(f"{index.name}-faiss")
    retrievers = retrievers_of(retriever, chosen, folder, threads)
    generator = ask.generator(url, model, 120.0)
    with view.progress(quiet=as_json) as bar:
        task = bar.add_task("questions", total=len(texts))
        runs = benching.measure(
            retrievers, lambda question: generator, texts, pipeline=pipeline, k=k, nprobe=nprobe,
            answer_tokens=answer_tokens, multiple=multiple,
            progress=lambda done: bar.update(task, completed=done),
        )  # fmt: skip
    show(runs, f"{pipeline}, {len(texts)} questions, memory {memory}", as_json=as_json)


def retrievers_of(
    retriever: Retriever, arms: tuple[Arm, ...], folder: Path, threads: int
) -> dict[Arm, Retriever]:
    """Return the retriever of each arm: those of the budget share one, as they are cold anyway."""
    from toolkit.rag import bench as benching
    from toolkit.rag.tiers import Tiers

    made: dict[Arm, Retriever] = {}
    for arm in arms:
        if arm == "faiss":
            made[arm] = benching.FaissOnDisk(retriever, folder, threads=threads)
        elif arm == "ram":
            whole = Tiers(retriever.store, budget_bytes=retriever.store.num_bytes_held + units.MIB)
            made[arm] = type(retriever)(retriever.store, retriever.encoder, whole)
        else:
            made[arm] = retriever
    return made


def show(runs: list[Run], title: str, *, as_json: bool) -> None:
    """Print the table of a comparison, or all of its runs as JSON."""
    from toolkit.rag import bench as benching

    found = benching.summarise(runs)
    versus = {
        under: {
            over.arm: _middle(benching.ratios(runs, over.arm, under))
            for over in found
            if over.arm != under
        }
        for under in (each.arm for each in found)
    }
    view.emit(
        {
            "title": title,
            "summary": [asdict(each) for each in found],
            "times_as_long": versus,
            "runs": [asdict(run) for run in runs],
        },
        as_json=as_json,
        render=lambda: _table(found, versus, title),
    )


def _table(found: list[Summary], versus: dict[Arm, dict[Arm, float]], title: str) -> Any:
    last = found[-1].arm
    names = {
        "faiss": "FAISS on disk", "off": "ours, no lookahead", "question": "+ lookahead",
        "progressive": "+ progressive", "ram": "ours, all in RAM",
    }  # fmt: skip
    return view.table(
        f"measured, cold: {title}",
        ["arm", "whole, median>", "p95>", "search, median>", "p95>", "a token>", "hit by bytes>",
         "wasted>", "read>", f"times {names[last]}>"],
        [
            (
                names[each.arm],
                units.format_seconds(each.total_s),
                units.format_seconds(each.total_p95_s),
                units.format_seconds(each.wait_s),
                units.format_seconds(each.wait_p95_s),
                units.format_seconds(each.piece_s),
                f"{each.hit_rate:.0%}" if each.hit_rate else "-",
                units.format_bytes(each.wasted_bytes) if each.wasted_bytes else "-",
                units.format_bytes(each.read_bytes) if each.read_bytes else "-",
                f"{versus[last][each.arm]:.2f}" if each.arm != last else "1",
            )
            for each in found
        ],
    )  # fmt: skip


def _middle(values: list[float]) -> float:
    import statistics

    return statistics.median(values)


def _questions(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise UsageError(f"no question in {path}", remedy="write one a line")
    return texts
