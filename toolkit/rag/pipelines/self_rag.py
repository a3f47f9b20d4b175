"""Self-RAG: the model decides whether to search, and which of the passages to answer from.

Asai et al. 2023, "Self-RAG", arXiv 2310.11511, trains a model to write reflection tokens. Here any
chat model is asked the same questions in words, and how well the answer is supported is counted by
`citations` instead of judged by the model. The window before the search is a token or two, so it is
the pipeline where lookahead can hide least (TeleRAG gives it the smallest budget).
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.rag import prompts
from toolkit.rag.retriever import Hit
from toolkit.rag.session import Evidence, Session


@dataclass(frozen=True)
class SelfRag:
    """A decision, a search, and a judgement of each passage."""

    max_tokens: int = 3

    def run(self, session: Session, question: str) -> Evidence:
        """Return the passages the model calls relevant, or all when it calls none so.

        Where it says that none are needed, the search is made all the same: the answer is to rest
        on documents, and a small model says "no" too easily. What it said is on the timeline.
        """
        session.generate(
            prompts.needs_passages(question), max_tokens=self.max_tokens, name="needs passages?",
            towards=lambda text: (question, []),
        )  # fmt: skip
        hits = session.search(question)
        kept = [hit for hit in hits if self._relevant(session, question, hit)]
        return Evidence(kept or hits)

    def _relevant(self, session: Session, question: str, hit: Hit) -> bool:
        said = session.generate(
            prompts.is_relevant(question, hit), max_tokens=self.max_tokens, name="relevant?"
        )  # fmt: skip
        return said.strip().lower().startswith("yes")
