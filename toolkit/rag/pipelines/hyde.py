"""HyDE: search with a passage the model makes up, which looks more like an answer than a question.

Gao et al. 2022, "Precise Zero-Shot Dense Retrieval without Relevance Labels", arXiv 2212.10496:
the query vector is the mean of the question's and of the hypothetical documents' (section 3.2);
here one document is written. TeleRAG calls this pipeline "linear".
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.rag import prompts
from toolkit.rag.session import Evidence, Session


@dataclass(frozen=True)
class HyDE:
    """Generate, then search. `max_tokens` is about a passage; it is searched with, never shown."""

    max_tokens: int = 64

    def run(self, session: Session, question: str) -> Evidence:
        """Return the best passages for the question and a hypothetical answer to it."""
        text = session.generate(
            prompts.hypothetical(question), max_tokens=self.max_tokens,
            name="hypothetical passage", towards=lambda text: with_text(question, text),
        )  # fmt: skip
        return Evidence(session.search(*with_text(question, text)))


def with_text(question: str, text: str) -> tuple[str, list[str]]:
    """Return the search for a question and a text, or for the question alone while it is empty."""
    return question, [text] if text.strip() else []
