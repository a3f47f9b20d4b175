"""Iterative: search, ask the model what is still missing, search for that, a few times.

LlamaIndex's multi-step query engine, which TeleRAG measures as "iterative", at most three searches.
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.rag import prompts
from toolkit.rag.fusion import fuse
from toolkit.rag.pipelines.hyde import with_text
from toolkit.rag.session import Evidence, Session


@dataclass(frozen=True)
class Iterative:
    """`rounds` searches, with a generation between each two."""

    rounds: int = 3
    max_tokens: int = 32

    def run(self, session: Session, question: str) -> Evidence:
        """Return the best passages of all rounds."""
        found = [session.search(question)]
        asked = {question.lower()}
        while len(found) < self.rounds:
            text = session.generate(
                prompts.following(question, fuse(found, session.k)), max_tokens=self.max_tokens,
                name="next question", towards=lambda text: with_text(question, text),
            )  # fmt: skip
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            if not lines or lines[0].upper().startswith("DONE") or lines[0].lower() in asked:
                break
            asked.add(lines[0].lower())
            found.append(session.search(*with_text(question, lines[0])))
        return Evidence(fuse(found, session.k))
