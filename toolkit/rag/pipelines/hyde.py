"""HyDE: search with a passage the model makes up, which looks more like an answer than a question.

Gao et al. 2022, "Precise Zero-Shot Dense Retrieval without Relevance Labels", arXiv 2212.10496:
the query vector is the mean of the question's and of the hypothetical documents' (section 3.2);
here one document is written. TeleRAG calls this pipeline "linear".
"""

from __future__ import annotations

from toolkit.rag.retriever import Hit
from toolkit.rag.session import Session

_MAX_TOKENS = 64  # about a passage; the text is searched with, never shown


def retrieve(session: Session, question: str) -> list[Hit]:
    """Return the best passages for the question and a hypothetical answer to it."""
    prompt = f"Write one short paragraph that answers the question.\nQuestion: {question}"
    hypothetical = session.generate(
        [{"role": "user", "content": prompt}], max_tokens=_MAX_TOKENS, name="hypothetical passage"
    )
    return session.search(question, documents=[hypothetical] if hypothetical.strip() else [])
