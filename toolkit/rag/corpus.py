"""Documents into passages: sentence-aware slices of about 75 words that know their lines.

A passage's text is a verbatim slice of its document, so a citation can be checked by opening the
file. Everything is a generator: a corpus is never held in memory, only a digest a passage, to drop
duplicates.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from toolkit.errors import UsageError

# DPR and TeleRAG's data store cut Wikipedia into 100-word passages; technical text has more
# tokens a word, and 75 of its words stay below the 256 tokens that MiniLM was trained on.
PASSAGE_WORDS = 75

# A run without spaces (base64, a table rule) counts as several words, so that no passage is longer
# than an encoder can read.
_WORD = re.compile(r"\S{1,32}")
_PARAGRAPH_END = re.compile(r"\n[^\S\n]*\n\s*")
# After . ! or ?, before something that can begin a sentence; "e.g. the" and "3.11" do not match.
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]”’]*\s+(?=[\"'(\[“‘]?[A-Z0-9*-])")


Meta = Mapping[str, str | int | float | bool]  # what a passage can be filtered by
Line = tuple[str, int, int]  # a line of text, and the lines of its source it begins and ends on


@dataclass(frozen=True)
class Document:
    """One readable text and where each of its lines stands in its source.

    `source` is a path relative to the corpus root (or a name, for data without files);
    line i of `text` begins on the 1-based line `first_lines[i]` of `source` and ends on
    `last_lines[i]` (the same, unless the source breaks it). For rows of a data set both are the
    row's number.
    """

    source: str
    title: str
    text: str
    first_lines: tuple[int, ...]
    last_lines: tuple[int, ...]
    meta: Meta = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        num_lines = self.text.count("\n") + 1
        if not len(self.first_lines) == len(self.last_lines) == num_lines:
            raise ValueError(
                f"{self.source}: {len(self.first_lines)} first and {len(self.last_lines)} last "
                f"lines for a text of {num_lines} lines"
            )

    @classmethod
    def of_lines(cls, source: str, title: str, lines: Sequence[Line]) -> Document:
        """Make a document of its lines: (text, first line in the source, last line)."""
        text, first, last = zip(*lines or [("", 1, 1)], strict=True)
        return cls(source, title, "\n".join(text), first, last)


@dataclass(frozen=True)
class Passage:
    """A slice of a document: lines [start_line, end_line] of `source`, counted from 1."""

    id: int
    source: str
    title: str
    text: str
    start_line: int
    end_line: int
    meta: Meta = field(default_factory=dict, hash=False)

    @property
    def embedded(self) -> str:
        """What the encoder reads: a passage cut from the middle still says what it is about."""
        return f"{self.title}\n{self.text}" if self.title else self.text

    def digest(self, *, place: bool = False) -> bytes:
        """Return 16 bytes for what it says, white space aside (and for where, if `place`)."""
        normal = " ".join(self.embedded.split())
        if place:
            normal = f"{self.place}\0{sorted(self.meta.items())}\0{normal}"
        return hashlib.blake2b(normal.encode(), digest_size=16).digest()

    @property
    def place(self) -> str:
        """Where it stands, as editors and compilers write it.

        >>> Passage(0, "guide.md", "Guide", "text", 3, 5).place
        'guide.md:3-5'
        """
        if self.start_line == self.end_line:
            return f"{self.source}:{self.start_line}"
        return f"{self.source}:{self.start_line}-{self.end_line}"


@dataclass(frozen=True)
class Corpus:
    """Where documents come from. `root` is the folder that sources are relative to, if any.

    `documents` starts a fresh pass each time it is called, always in the same order; what cannot
    be read is passed, with the reason, to the function it is given.
    """

    name: str
    root: Path | None
    documents: Callable[[Callable[[str, str], None]], Iterator[Document]]


def num_words(text: str) -> int:
    """Count words; a run of more than 32 characters counts once for every 32.

    >>> num_words("How long is this?"), num_words("x" * 100)
    (4, 4)
    """
    return sum(1 for _ in _WORD.finditer(text))


def _cut(text: str, start: int, end: int, pattern: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """Yield the non-blank stretches of text[start:end] between the matches of `pattern`."""
    for found in pattern.finditer(text, start, end):
        if text[start : found.end()].strip():
            yield start, found.end()
            start = found.end()
    if text[start:end].strip():
        yield start, end


def _pieces(text: str, words: int) -> Iterator[tuple[int, int, int, bool]]:
    """Yield (start, end, num_words, ends a paragraph): the sentences that passages are made of."""
    for first, last in _cut(text, 0, len(text), _PARAGRAPH_END):
        for start, end in _cut(text, first, last, _SENTENCE_END):
            found = list(_WORD.finditer(text, start, end))
            # A sentence longer than a passage (code, a table) is cut between words.
            for i in range(0, len(found), words):
                stop = found[i + words].start() if i + words < len(found) else end
                begin = found[i].start()
                yield begin, stop, min(words, len(found) - i), stop == last


def _windows(text: str, words: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of passages: whole sentences, at most `words`, ending well if they can."""
    held: list[tuple[int, int, int, bool]] = []
    total = fresh = 0
    for piece in _pieces(text, words):
        if held and total + piece[2] > words:
            if fresh:
                yield held[0][0], held[-1][1]
            kept = 0
            while kept < len(held) and sum(p[2] for p in held[-kept - 1 :]) <= overlap:
                kept += 1
            held = held[len(held) - kept :]
            # The overlap gives way when the next sentence needs the room.
            while held and sum(p[2] for p in held) + piece[2] > words:
                held = held[1:]
            total, fresh = sum(p[2] for p in held), 0
        held.append(piece)
        total += piece[2]
        fresh += piece[2]
        # A paragraph that ends near the target is a better end than the middle of the next one.
        if piece[3] and total >= 0.8 * words and not overlap:
            yield held[0][0], held[-1][1]
            held, total, fresh = [], 0, 0
    if fresh:
        yield held[0][0], held[-1][1]


def split(
    document: Document, *, words: int = PASSAGE_WORDS, overlap: int = 0, first_id: int = 0
) -> Iterator[Passage]:
    """Yield the document's passages in order, each of at most `words` words.

    Without overlap they cover every word of the text exactly once; with it, a passage begins with
    the last whole sentences (at most `overlap` words) of the one before.

    >>> lines = [("One two. Three four.", 1, 1), ("", 2, 2), ("Five six.", 3, 3)]
    >>> guide = Document.of_lines("guide.md", "Guide", lines)
    >>> [(p.text, p.place) for p in split(guide, words=4)]
    [('One two. Three four.', 'guide.md:1'), ('Five six.', 'guide.md:3')]
    """
    if words < 1 or not 0 <= overlap < words:
        raise UsageError(
            f"passages of {words} words with an overlap of {overlap} are impossible",
            remedy="take at least 1 word, and an overlap from 0 to below that",
        )
    text = document.text
    line, scanned = 0, 0  # `line` newlines lie before `scanned`
    for begin, end in _windows(text, words, overlap):
        # Code keeps the indentation of its first line.
        margin = text.rfind("\n", 0, begin) + 1
        start = begin if text[margin:begin].strip() else margin
        content = text[start:end].rstrip()
        if start < scanned:
            line, scanned = text.count("\n", 0, start), start
        line, scanned = line + text.count("\n", scanned, start), start
        yield Passage(
            id=first_id,
            source=document.source,
            title=document.title,
            text=content,
            start_line=document.first_lines[line],
            end_line=document.last_lines[line + content.count("\n")],
            meta=document.meta,
        )
        first_id += 1


def passages(
    documents: Iterable[Document],
    *,
    words: int = PASSAGE_WORDS,
    overlap: int = 0,
    limit: int | None = None,
) -> Iterator[Passage]:
    """Yield the passages of all documents, numbered from 0, each text (and title) once.

    Texts that differ only in white space are the same; the first one met is kept.
    """
    seen: set[bytes] = set()
    for document in documents:
        for passage in split(document, words=words, overlap=overlap):
            if limit is not None and len(seen) >= limit:
                return
            mark = passage.digest()
            if mark not in seen:
                yield replace(passage, id=len(seen))
                seen.add(mark)
