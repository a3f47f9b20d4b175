"""IRG (iter-retgen): answer, search again with the question and that answer, and answer again.

Shao et al. 2023, "Enhancing Retrieval-Augmented Large Language Models with Iterative
Retrieval-Generation Synergy", arXiv 2305.15294. The last answer is the one that `ask` writes.
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.rag import prompts
from toolkit.rag.pipelines.hyde import with_text
from toolkit.rag.session import Evidence, Session


@dataclass(frozen=True)
class IterRetGen:
    """`rounds` searches, with a draft of the answer between each two."""

    rounds: int = 3
    max_tokens: int = 48

    def run(self, session: Session, question: str) -> Evidence:
        """Return the passages that the last search finds."""
        hits = session.search(question)
        for _ in range(self.rounds - 1):
            draft = session.generate(
                prompts.answer(question, hits), max_tokens=self.max_tokens, name="draft",
                towards=lambda text: with_text(question, text),
            )  # fmt: skip
            hits = session.search(*with_text(question, draft))
        return Evidence(hits)
