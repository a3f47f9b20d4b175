"""Search with the question as it was asked: one round, nothing generated before it."""

from __future__ import annotations

from toolkit.rag.retriever import Hit
from toolkit.rag.session import Session


def retrieve(session: Session, question: str) -> list[Hit]:
    """Return the best passages for the question itself."""
    return session.search(question)
