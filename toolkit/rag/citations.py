"""Which passage says what a sentence of the answer says: written by the model, or attributed here.

A small model often leaves citations out or invents numbers. Numbers that no passage has are
dropped; a sentence without a citation is attributed to the passage that holds most of its words, if
it holds enough of them, and is reported as unsupported otherwise. Nothing is made to look written
that was not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

How = Literal["written", "attributed"]

# A sentence is attributed when a passage holds at least this share of its content words. Half is
# where a paraphrase of a passage still lands and a sentence on another subject no longer does.
MIN_SUPPORT = 0.5
_MIN_WORDS = 3  # too few words ("Yes, it is.") fit any passage

_WORD = re.compile(r"[^\W\d_][\w]*(?:\.\w+)*|__\w+__")
_STOP_WORDS = """
a about after all also an and any are as at be because been before being but by can could did
do does doing each for from had has have having how i if in into is it its just may more most
must no not of on once only or other our over own same should so some such than that the their
them then there these they this those through to too under until up used uses using very was
we were what when where which while who why will with would you your
"""
_STOP = frozenset(_STOP_WORDS.split())
MARKER = re.compile(r"\[(\d+(?:\s*[,;]\s*\d+)*)\]")
_LETTER = re.compile(r"[^\W\d_]")
_SENTENCE_END = re.compile(
    r"[.!?][\"'”’)]*(?:[ \t]*\[\d+(?:, \d+)*\])*(?=\s+[\"'“‘(`\[]?[A-Z0-9]|\s*$)"
    # A text may be wrapped: only an empty line, or a list or marker on the next, ends a sentence.
    r"|\n\s*\n|\n(?=\s*(?:[-*•]|\d+[.)]|\[\d)\s?)"
)


@dataclass(frozen=True)
class Citation:
    """A sentence of the answer, and the passage it rests on.

    `number` is the passage's number in the prompt, lines are those of the file `source`, `sentence`
    is [start, end) in the answer's text. `support` is the share of the sentence's content words
    that the passage holds: of written citations too, so that a false one can be seen.
    """

    number: int
    passage_id: int
    source: str
    start_line: int
    end_line: int
    how: How
    support: float
    sentence: tuple[int, int]


def sentences(text: str) -> list[tuple[int, int]]:
    """Return [start, end) of each sentence; markers after its full stop belong to it.

    What has no letter is no sentence: it joins the next one, or at the end the last.

    >>> text = "It is fast. [1] Use 3.11, e.g. on Linux."
    >>> [text[start:end] for start, end in sentences(text)]
    ['It is fast. [1]', 'Use 3.11, e.g. on Linux.']
    """
    found, start = [], 0
    for end in [match.end() for match in _SENTENCE_END.finditer(text)] + [len(text)]:
        part = text[start:end]
        begin, stop = start + len(part) - len(part.lstrip()), start + len(part.rstrip())
        if _LETTER.search(part):
            found.append((begin, stop))
        elif end < len(text):
            continue  # a marker alone ("[1].") begins what follows
        elif found and part.strip():
            found[-1] = (found[-1][0], stop)
        start = end
    return found


def content_words(text: str) -> list[str]:
    """Return the words that carry meaning, lower case, plurals cut, each once.

    >>> content_words("The with statement closes files, and the file is closed.")
    ['statement', 'close', 'file', 'closed']
    """
    found: dict[str, None] = {}
    for word in _WORD.findall(MARKER.sub(" ", text)):
        low = word.lower()
        if low not in _STOP and len(low) > 1:
            found.setdefault(low[:-1] if len(low) > 3 and low.endswith("s") else low)
    return list(found)


def support(sentence: str, passage: str) -> float:
    """Return the share of a sentence's content words that a passage holds, 0 to 1.

    >>> support("The file is closed.", "Closed files raise an error."), support("It is.", "It is.")
    (1.0, 0.0)
    """
    words = content_words(sentence)
    held = set(content_words(passage))
    return sum(word in held for word in words) / len(words) if words else 0.0


def attribute(sentence: str, passages: Sequence[str]) -> tuple[int, float] | None:
    """Return (index, support) of the passage that best supports a sentence, or None.

    The earlier passage, which search ranked higher, wins ties.
    """
    if len(content_words(sentence)) < _MIN_WORDS or not passages:
        return None
    scores = [support(sentence, passage) for passage in passages]
    best = max(range(len(scores)), key=lambda i: (scores[i], -i))
    return (best, scores[best]) if scores[best] >= MIN_SUPPORT else None
