"""What models are asked: each prompt is one function, used by the answer and by pipelines."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.rag.generator import Message
from toolkit.rag.retriever import Hit

NOT_FOUND = "Not found in the passages."

_SYSTEM = (
    "You answer questions about documents. Use only the passages you are given. "
    f'If they do not hold the answer, say: "{NOT_FOUND}"'
)


def answer(question: str, hits: Sequence[Hit], *, so_far: str = "") -> list[Message]:
    """Return the messages that ask a model to answer from numbered passages.

    With `so_far`, the beginning of the answer, they ask for its next sentence.
    """
    # Tried on a 135M model: with the task after the passages it stays closest to them, and with
    # passages that begin "[1]" it goes on to write passages. Larger models do not mind.
    task = (
        "Answer the question in your own words in at most three sentences, citing passages like "
        f"[1].\nQuestion: {question}\nAnswer:"
    )
    if so_far:
        task = (
            f"Question: {question}\nThe answer so far: {so_far}\n"
            "Write only the next sentence of the answer, citing passages like [1]. "
            "If nothing is missing, write: END"
        )
    return [
        {"role": "system", "content": _SYSTEM},
        {"role": "user", "content": f"Passages:\n\n{_numbered(hits)}\n\n{task}"},
    ]


def hypothetical(question: str) -> list[Message]:
    """Return the messages that ask for a passage that would answer (HyDE)."""
    return _user(f"Write one short paragraph that answers the question.\nQuestion: {question}")


def parts(question: str, most: int) -> list[Message]:
    """Return the messages that ask for the simpler questions that a question is made of."""
    return _user(
        f"Break this question into at most {most} simpler questions that can be looked up one by "
        f"one. Write one a line and nothing else.\nQuestion: {question}"
    )


def following(question: str, hits: Sequence[Hit]) -> list[Message]:
    """Return the messages that ask what to look up next, knowing some passages."""
    return _user(
        f"Passages:\n\n{_numbered(hits)}\n\nTo answer the question below, one more thing may have "
        "to be looked up. Write it as one short question, or DONE if nothing is missing.\n"
        f"Question: {question}"
    )


def needs_passages(question: str) -> list[Message]:
    """Return the messages that ask whether documents are needed (Self-RAG's first decision)."""
    return _user(
        f"Does answering this need facts from documents? Say yes or no.\nQuestion: {question}"
    )


def is_relevant(question: str, hit: Hit) -> list[Message]:
    """Return the messages that ask whether a passage helps (Self-RAG's critique)."""
    return _user(
        f"Passage: {hit.passage.title}\n{hit.passage.text}\n\nDoes the passage help to answer the "
        f"question? Say yes or no.\nQuestion: {question}"
    )


def _numbered(hits: Sequence[Hit]) -> str:
    return "\n\n".join(
        f"Passage {number}: {hit.passage.title}\n{hit.passage.text}"
        for number, hit in enumerate(hits, start=1)
    )


def _user(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]
