"""Search with the question as it was asked: one round, nothing generated before it."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.rag.session import Evidence, Session


@dataclass(frozen=True)
class Plain:
    """One search."""

    def run(self, session: Session, question: str) -> Evidence:
        """Return the best passages for the question itself."""
        return Evidence(session.search(question))
