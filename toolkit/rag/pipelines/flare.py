"""FLARE: write the answer a sentence at a time, looking up each sentence before it is kept.

Jiang et al. 2023, "Active Retrieval Augmented Generation", arXiv 2305.06983. There a sentence is
looked up when a token in it is improbable; a stream of text carries no probabilities, so here every
sentence is, which is the paper's method at a threshold of 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.rag import citations, prompts
from toolkit.rag.fusion import fuse
from toolkit.rag.retriever import Hit
from toolkit.rag.session import Evidence, Session


@dataclass(frozen=True)
class Flare:
    """At most `sentences`, each generated twice: tentatively, and with what was found for it."""

    sentences: int = 3
    max_tokens: int = 48

    def run(self, session: Session, question: str) -> Evidence:
        """Return the passages of the last rounds and the answer written over them."""
        found = [session.search(question)]
        said = ""
        for _ in range(self.sentences):
            tentative = self._sentence(session, question, fuse(found[-2:], session.k), said, True)
            if not tentative:
                break
            found.append(session.search(tentative))
            kept = self._sentence(session, question, fuse(found[-2:], session.k), said, False)
            if not kept or kept in said:
                break
            said = f"{said} {kept}".strip()
        # Citation numbers are those of the prompts they were written under; attributed ones remain.
        return Evidence(fuse(found[::-1], session.k), citations.MARKER.sub("", said) or None)

    def _sentence(
        self, session: Session, question: str, hits: list[Hit], said: str, tentative: bool
    ) -> str:
        """Return the next sentence; while a tentative one comes, its search is prepared."""
        parts: list[str] = []

        def complete() -> bool:
            return len(citations.sentences("".join(parts))) > 1

        text = session.generate(
            prompts.answer(question, hits, so_far=said), max_tokens=self.max_tokens,
            name="tentative sentence" if tentative else "sentence",
            towards=(lambda text: (text.strip() or question, [])) if tentative else None,
            on_text=parts.append, enough=complete,
        )  # fmt: skip
        spans = citations.sentences(text)
        first = text[slice(*spans[0])] if spans else ""
        return "" if first.strip().rstrip(".").upper() == "END" else first
