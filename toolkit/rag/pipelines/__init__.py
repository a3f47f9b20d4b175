"""How a question becomes searches: each pipeline is one small class, chosen by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from toolkit.errors import unknown_name
from toolkit.rag.pipelines.flare import Flare
from toolkit.rag.pipelines.hyde import HyDE
from toolkit.rag.pipelines.irg import IterRetGen
from toolkit.rag.pipelines.iterative import Iterative
from toolkit.rag.pipelines.plain import Plain
from toolkit.rag.pipelines.self_rag import SelfRag
from toolkit.rag.pipelines.sub_question import SubQuestion
from toolkit.rag.session import Evidence, Session


class Pipeline(Protocol):
    """Rounds of generation and search that end in passages to answer from."""

    def run(self, session: Session, question: str) -> Evidence:
        """Return what was found for a question."""
        ...


PIPELINES: Mapping[str, Pipeline] = {
    "plain": Plain(), "hyde": HyDE(), "sub-question": SubQuestion(), "iterative": Iterative(),
    "irg": IterRetGen(), "flare": Flare(), "self-rag": SelfRag(),
}  # fmt: skip


def find(name: str) -> Pipeline:
    """Return the pipeline called `name`. Raises UsageError naming the nearest."""
    if name not in PIPELINES:
        raise unknown_name("pipeline", name, PIPELINES)
    return PIPELINES[name]
