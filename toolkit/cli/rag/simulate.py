"""toolkit rag simulate: lookahead on the paper's GPUs, from real rankings of lists."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from toolkit import units
from toolkit.cli import view
from toolkit.cli.rag import options
from toolkit.errors import UsageError


def simulate(
    index: options.Index,
    recordings: Annotated[
        list[Path], typer.Argument(metavar="RECORDING...", help="Saved by ask --recording.")
    ],
    *,
    nprobe: options.Probes = None,
    multiple: Annotated[
        float, typer.Option(help="Lookahead copies at most so many times what a search scans.")
    ] = 2.0,
    machine: Annotated[
        str, typer.Option(help="rtx-4090, h100-sxm, h200, or several with commas.")
    ] = "rtx-4090,h100-sxm,h200",
    memory: options.Memory = options.MEMORY,
    threads: options.Threads = 1,
    as_json: view.Json = False,
) -> None:
    """Simulate lookahead from host to GPU memory: real rankings, the index scaled to 60.1 GiB.

    Example: toolkit rag simulate runs/docs runs/rounds-1.json runs/rounds-2.json
    """
    from toolkit.rag import Recording
    from toolkit.rag.ranks import ranks
    from toolkit.rag.simulate import machines
    from toolkit.rag.simulate import simulate as run

    played = [Recording.load(path) for path in recordings]
    names = {each.pipeline for each in played}
    if len(names) > 1:
        raise UsageError(f"recordings of {', '.join(sorted(names))}", remedy="give one pipeline's")
    retriever = options.open_index(index, threads, memory)
    probes = retriever.probes(nprobe)
    questions = [
        ranks(retriever, each, k=4, nprobe=probes, depth=4 * probes) for each in played
    ]  # fmt: skip
    nums = retriever.store.list_nums()
    found = [
        run(each, questions, nums, mode=mode, multiple=multiple, batch=batch)
        for each in machines(machine.split(","))
        for batch in (1, 4)
        for mode in ("question", "progressive")
    ]
    (pipeline,) = names
    title = f"simulated: {pipeline}, {len(played)} questions, {probes} of {len(nums)} lists"
    view.emit(
        {"title": title, "simulated": [{**asdict(e), "speedup": e.speedup} for e in found]},
        as_json=as_json,
        render=lambda: _table(title, found),
    )


def _table(title: str, found: list[Any]) -> Any:
    return view.table(
        title,
        ["machine, model", "batch>", "lookahead", "without>", "with>", "speed-up>",
         "hit by bytes>", "copied>"],
        [
            (
                each.machine,
                each.batch,
                each.mode,
                units.format_seconds(each.without_s),
                units.format_seconds(each.with_s),
                f"{each.speedup:.2f}",
                f"{each.hit_rate:.0%}",
                units.format_bytes(each.copied_bytes),
            )
            for each in found
        ],
    )  # fmt: skip
