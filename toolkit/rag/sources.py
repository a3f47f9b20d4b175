"""Where documents come from: a folder, a file, JSONL, a data set, or Python's own documentation."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from toolkit.errors import (
    FormatError,
    MissingExtraError,
    ToolkitError,
    UsageError,
    require,
    unknown_name,
)
from toolkit.rag import python_docs
from toolkit.rag.corpus import Corpus, Document, Line, Meta

PYTHON_DOCS = "python-docs"
DATASET = "datasets:"  # prefix: datasets:NAME[/CONFIG...][:SPLIT]

_TEXT = """
.txt .text .md .markdown .rst .adoc .org .tex .log .csv .tsv .py .pyi .c .h .cc .cpp .hpp .cu
.java .go .rs .js .ts .sh .sql .toml .yaml .yml .ini .cfg .json .xml
"""
TEXT_SUFFIXES = frozenset(_TEXT.split())
HTML_SUFFIXES = frozenset((".html", ".htm", ".xhtml"))
JSONL_SUFFIXES = frozenset((".jsonl", ".ndjson"))
PDF_SUFFIXES = frozenset((".pdf",))

_READ = TEXT_SUFFIXES | HTML_SUFFIXES | JSONL_SUFFIXES | PDF_SUFFIXES

Skipped = Callable[[str, str], None]


@dataclass(frozen=True)
class Fields:
    """Which fields of a record are its text and its metadata."""

    text: str
    meta: tuple[str, ...] = ()


def find(spec: str, *, text_field: str = "text", meta_fields: Sequence[str] = ()) -> Corpus:
    """Return the corpus that `spec` names.

    `python-docs`; a folder (text, source code, HTML, PDF and JSONL below it); one such file; or
    `datasets:NAME` (a Hugging Face data set, or a folder written by its save_to_disk), optionally
    with `:SPLIT`. `text_field` is the field of JSONL records and data set rows that is read;
    `meta_fields` are kept with each passage, to be filtered by.

    Raises UsageError when nothing of that name exists.
    """
    fields = Fields(text_field, tuple(meta_fields))
    if spec == PYTHON_DOCS:
        root = python_docs.root()
        return Corpus(spec, root, lambda skipped: python_docs.documents(root, skipped))
    if spec.startswith(DATASET):
        name, _, split = spec.removeprefix(DATASET).partition(":")
        rows = _dataset(name, split or "train")
        return Corpus(spec, None, lambda skipped: _row_documents(name, rows, fields, skipped))
    path = Path(spec).expanduser()
    if path.is_dir():
        root = path.resolve()
        return Corpus(str(root), root, lambda skipped: _folder_documents(root, fields, skipped))
    if path.is_file():
        file = path.resolve()
        return Corpus(
            str(file), file.parent,
            lambda skipped: _file_documents(file, file.name, fields, skipped),
        )  # fmt: skip
    if "/" not in spec and "." not in spec:
        raise unknown_name("corpus", spec, [PYTHON_DOCS])
    raise UsageError(
        f"no such file or folder: {spec}",
        remedy=f"give a folder, a file, {DATASET}NAME, or {PYTHON_DOCS}",
    )


def _folder_documents(root: Path, fields: Fields, skipped: Skipped) -> Iterator[Document]:
    """Yield the documents of every readable file below `root`, by path; hidden ones left out."""
    for place, folders, files in os.walk(root):
        if _is_index(Path(place)):
            skipped(Path(place).relative_to(root).as_posix(), "an index of documents")
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.startswith("."):
                continue
            path = Path(place) / name
            source = path.relative_to(root).as_posix()
            if path.suffix.lower() in _READ:
                try:
                    yield from _file_documents(path, source, fields, skipped)
                except MissingExtraError as error:
                    skipped(source, str(error))
            else:
                skipped(source, f"{path.suffix or 'a file without suffix'} is not read")


def _is_index(folder: Path) -> bool:
    """Whether a folder is an index, whole or unfinished; its texts are other files'."""
    marks = ("manifest.json", "building")
    return (folder / ".lock").exists() and any((folder / name).exists() for name in marks)


def _file_documents(
    path: Path, source: str, fields: Fields, skipped: Skipped
) -> Iterator[Document]:
    suffix = path.suffix.lower()
    if suffix in JSONL_SUFFIXES:
        yield from _jsonl_documents(path, source, fields)
        return
    if suffix in PDF_SUFFIXES:
        yield from _pdf_documents(path, source, skipped)
        return
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        skipped(source, error.strerror or str(error))
        return
    if "\0" in text:
        skipped(source, "not text")
    elif suffix in HTML_SUFFIXES:
        yield html_document(text, source)
    else:
        yield text_document(text, source)


def text_document(text: str, source: str) -> Document:
    """Return a plain text, Markdown or source file as it is, titled by its first heading.

    >>> text_document("# Guide\\n\\nHello.", "guide.md").title
    'Guide'
    """
    title = Path(source).stem
    if source.lower().endswith((".md", ".markdown")):
        headings = (line.lstrip("#") for line in text.split("\n") if line.startswith("#"))
        title = next((h.strip() for h in headings if h.strip()), title)
    numbers = tuple(range(1, text.count("\n") + 2))
    return Document(source, title, text, numbers, numbers)


def html_document(text: str, source: str) -> Document:
    """Return what a page says, without markup, scripts and navigation; lines are the file's."""
    page = _Page()
    page.feed(text)
    page.close()
    title = " ".join(page.title.split()) or Path(source).stem
    return Document.of_lines(source, title, page.finished())


# Elements inside a sentence; every other tag ends a paragraph.
_INLINE_TAGS = """
a abbr b bdi bdo cite code data del dfn em font i ins kbd mark q s samp small span strong
sub sup time tt u var wbr
"""
_INLINE = frozenset(_INLINE_TAGS.split())
_UNREAD = frozenset(("script", "style", "nav", "footer", "template", "noscript", "svg"))
_VERBATIM = frozenset(("pre", "textarea"))


class _Page(HTMLParser):
    """Gathers readable lines, each with the line number of the page where it begins."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.title = ""
        self._lines: list[Line] = []
        self._unread = 0
        self._verbatim = 0
        self._in_title = False
        self._open = False  # whether the last line may still grow

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._unread += tag in _UNREAD
        self._verbatim += tag in _VERBATIM
        self._in_title = tag == "title"
        self._boundary(tag)

    def handle_endtag(self, tag: str) -> None:
        # A page may close what it never opened.
        self._unread = max(0, self._unread - (tag in _UNREAD))
        self._verbatim = max(0, self._verbatim - (tag in _VERBATIM))
        self._in_title = False
        self._boundary(tag)

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data
        elif not self._unread:
            first = self.getpos()[0]
            for offset, part in enumerate(data.split("\n")):
                if offset:
                    self._open = False
                self._add(part, first + offset)

    def _add(self, text: str, number: int) -> None:
        if not self._verbatim:
            words = " ".join(text.split())
            text = f"{' ' if text[:1].isspace() else ''}{words}{' ' if text[-1:].isspace() else ''}"
        if self._open:
            before, first, _ = self._lines[-1]
            self._lines[-1] = (before + text, first, number)
        elif text.strip():
            self._lines.append((text if self._verbatim else text.lstrip(), number, number))
            self._open = True

    def _boundary(self, tag: str) -> None:
        if tag not in _INLINE and self._lines and self._lines[-1][0]:
            self._open = False
            number = self.getpos()[0]
            self._lines.append(("", number, number))

    def finished(self) -> list[Line]:
        """Return the lines, without blank ones at the end."""
        while self._lines and not self._lines[-1][0]:
            self._lines.pop()
        return [(line.rstrip(), first, last) for line, first, last in self._lines]


def _pdf_documents(path: Path, source: str, skipped: Skipped) -> Iterator[Document]:
    """Yield one document, the text of a PDF; its "lines" are pages, the only places a PDF has."""
    pypdf = require("pypdf", extra="pdf")
    try:
        reader = pypdf.PdfReader(path)
        title = str((reader.metadata or {}).get("/Title") or "").strip() or Path(source).stem
        pages = [page.extract_text() for page in reader.pages]
    # What a broken PDF raises comes from all over pypdf, its parsers' KeyErrors among it.
    except Exception as error:
        skipped(source, f"not a PDF that can be read ({type(error).__name__})")
        return
    lines = [
        (line.rstrip(), number, number)
        for number, page in enumerate(pages, start=1)
        for line in [*page.split("\n"), ""]
    ]
    if any(line[0] for line in lines):
        yield Document.of_lines(source, title, lines)
    else:
        skipped(source, "a PDF without text: scanned pages are not read")


def _jsonl_documents(path: Path, source: str, fields: Fields) -> Iterator[Document]:
    """Yield a document a record; its line is the record's line in the file."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield _row(source, *_fields(json.loads(line), fields, where), number)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}, line {number}: not JSON ({error})") from error
    except OSError as error:
        raise ToolkitError(f"cannot read {path}: {error.strerror or error}") from error


def _row(source: str, text: str, title: str, meta: Meta, number: int) -> Document:
    numbers = (number,) * (text.count("\n") + 1)
    return Document(source, title, text, numbers, numbers, meta)


def _fields(record: Any, fields: Fields, where: str) -> tuple[str, str, Meta]:
    """Return a record's text, title, and those metadata fields that it has as scalars."""
    if not isinstance(record, dict):
        raise FormatError(f"{where}: a record is an object, not {type(record).__name__}")
    text = record.get(fields.text)
    if not isinstance(text, str):
        names = [name for name, value in record.items() if isinstance(value, str)]
        raise UsageError(
            f"{where}: no text in the field {fields.text!r}",
            remedy=f"choose one with --text-field; it has: {', '.join(names) or 'no text fields'}",
        )
    title = record.get("title")
    meta = {
        name: record[name]
        for name in fields.meta
        if isinstance(record.get(name), str | int | float | bool)
    }
    return text, title if isinstance(title, str) else "", meta


def _dataset(name: str, split: str) -> Iterable[Any]:
    datasets = require("datasets", extra="rag")
    try:
        if Path(name).expanduser().is_dir() and (Path(name) / "state.json").is_file():
            return datasets.load_from_disk(name)
        if (Path(name) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(name)[split]
        return datasets.load_dataset(name, split=split, streaming=True)
    except (OSError, ValueError, KeyError) as error:
        # `datasets` raises these for a wrong name, a missing split and an unreachable hub.
        raise UsageError(
            f"the data set {name!r} (split {split!r}) cannot be opened: {error}",
            remedy="check its name and split, and that it is on this disk or the hub is reachable",
        ) from error


def _row_documents(
    name: str, rows: Iterable[Any], fields: Fields, skipped: Skipped
) -> Iterator[Document]:
    try:
        for number, row in enumerate(rows, start=1):
            text, title, meta = _fields(row, fields, f"{name}, row {number}")
            if text.strip():
                yield _row(name, text, title, meta, number)
            else:
                skipped(f"{name}:{number}", "an empty row")
    except OSError as error:  # a streamed data set comes over the network
        raise ToolkitError(f"reading the data set {name!r} failed: {error}") from error
