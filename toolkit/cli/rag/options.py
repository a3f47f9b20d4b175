"""The options that several commands of `toolkit rag` take, and how they open an index."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolkit import units
from toolkit.errors import UsageError

if TYPE_CHECKING:
    from toolkit.rag import Retriever
    from toolkit.rag.store import Recipe, StoreManifest

Index = Annotated[Path, typer.Argument(metavar="INDEX", help="The folder of an index.")]
Probes = Annotated[
    int | None, typer.Option("--nprobe", min=1, help="Lists to search. [default: the index's]")
]
Threads = Annotated[
    int, typer.Option("--threads", min=1, help="Threads; 1 when anything else runs here.")
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where", help="Only passages with e.g. source=docs/* or year>=2020. May repeat."
    ),
]
Memory = Annotated[str, typer.Option("--memory", help="Most memory that lists may take.")]
MEMORY = "1 GiB"


def open_index(index: Path, threads: int, memory: str = MEMORY) -> Retriever:
    """Open an index, with the threads of the process set on purpose."""
    from toolkit.errors import require
    from toolkit.rag import Retriever
    from toolkit.rag.store import read_manifest

    read_manifest(index)  # a wrong folder is said before seconds of imports
    budget_bytes = units.parse_bytes(memory)
    import torch

    torch.set_num_threads(threads)
    require("faiss", extra="rag").omp_set_num_threads(threads)
    return Retriever.open(index, budget_bytes=int(budget_bytes))


def recipe(manifest: StoreManifest, index: Path) -> Recipe:
    """Return how an index's vectors are made; UsageError when nothing says it."""
    if manifest.recipe is None:
        raise UsageError(f"{index} holds vectors without an encoder", remedy="build it anew")
    return manifest.recipe
