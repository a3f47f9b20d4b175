"""How a question becomes searches: each pipeline is one function, chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from toolkit.errors import unknown_name
from toolkit.rag.pipelines import hyde, plain
from toolkit.rag.retriever import Hit
from toolkit.rag.session import Session

Pipeline = Callable[[Session, str], list[Hit]]

PIPELINES: Mapping[str, Pipeline] = {"plain": plain.retrieve, "hyde": hyde.retrieve}


def find(name: str) -> Pipeline:
    """Return the pipeline called `name`. Raises UsageError naming the nearest."""
    if name not in PIPELINES:
        raise unknown_name("pipeline", name, PIPELINES)
    return PIPELINES[name]
