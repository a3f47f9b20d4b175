"""SubQuestion: the question is broken into simpler ones, which are looked up together.

LlamaIndex's sub-question query engine, which TeleRAG measures as "parallel": one generation, then
several searches at once, fused by rank.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from toolkit.rag import prompts
from toolkit.rag.fusion import fuse
from toolkit.rag.pipelines.hyde import with_text
from toolkit.rag.session import Evidence, Session

_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s*")


@dataclass(frozen=True)
class SubQuestion:
    """One generation, then at most `most` searches and that of the question itself."""

    most: int = 3
    max_tokens: int = 64

    def run(self, session: Session, question: str) -> Evidence:
        """Return the best passages of the question and of the parts the model sees in it."""
        text = session.generate(
            prompts.parts(question, self.most), max_tokens=self.max_tokens, name="sub-questions",
            towards=lambda text: with_text(question, text),
        )  # fmt: skip
        asked = [question, *parts(text, self.most)]
        found = session.search_many([(each, []) for each in asked])
        return Evidence(fuse(found, session.k))


def parts(text: str, most: int) -> list[str]:
    """Return the first lines of a list, without its bullets, each once.

    >>> parts("1. What is IVF?\\n2. What is a list?\\n\\n- What is IVF?", most=3)
    ['What is IVF?', 'What is a list?']
    """
    lines = (_BULLET.sub("", line).strip() for line in text.splitlines())
    return list(dict.fromkeys(line for line in lines if len(line) > 3))[:most]
