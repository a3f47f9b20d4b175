"""Folders, files, HTML, JSONL, data sets and Python's own documentation become documents."""

from __future__ import annotations

import ast
import re
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import FormatError, MissingExtraError, UsageError
from toolkit.rag import python_docs, sources
from toolkit.rag.corpus import Document, passages, split


def _read(spec: str, **how: str) -> tuple[dict[str, Document], dict[str, str]]:
    skipped: dict[str, str] = {}
    corpus = sources.find(spec, **how)
    found = {
        f"{d.source}:{d.first_lines[0]}": d for d in corpus.documents(skipped.__setitem__)
    }  # fmt: skip
    return found, skipped


def test_a_folder_is_read_in_order_and_says_what_it_leaves_out(garden: Path) -> None:
    found, skipped = _read(str(garden))
    assert list(found) == ["guide.md:1", "notes.jsonl:1", "notes.jsonl:3", "kitchen/bread.html:3"]
    assert skipped == {"photo.jpg": ".jpg is not read", "binary.txt": "not text"}
    assert found["guide.md:1"].title == "Garden guide"
    assert found["notes.jsonl:1"].title == "Frost"
    assert found["notes.jsonl:3"].text == "Seeds keep for three years."


def test_html_keeps_what_is_read_and_where_it_stands(garden: Path) -> None:
    found, _ = _read(str(garden / "kitchen" / "bread.html"))
    page = found["bread.html:3"]
    assert page.title == "Bread & butter"
    lines = [
        (line, number)
        for line, number in zip(page.text.split("\n"), page.first_lines, strict=True)
        if line
    ]
    assert lines == [
        ("Bread", 3),
        ("Knead the dough for ten", 4),
        ("minutes.", 5),
        ("Bake it hot.", 5),
        ("flour  500 g", 6),
        ("water  350 g", 7),
    ]
    assert "\n\n" in page.text


@given(st.lists(st.sampled_from(["<p>", "</p>", "<b>", "text ", "\n", "<pre>", "</pre>", "&lt;"])))
def test_any_html_gives_lines_of_the_page(parts: list[str]) -> None:
    page = "".join(parts)
    document = sources.html_document(page, "page.html")
    last = page.count("\n") + 1
    assert all(1 <= n <= last for n in document.first_lines)
    assert list(document.first_lines) == sorted(document.first_lines)
    assert document.text.count("text") == page.count("text")


def test_an_index_inside_the_folder_is_left_out(
    garden: Path, garden_index: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(garden, tmp_path / "garden"))
    shutil.copytree(garden_index, folder / "runs" / "index")
    found, skipped = _read(str(folder))
    assert skipped["runs/index"] == "an index of documents"
    assert len(found) == 4


def test_jsonl_errors_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(FormatError, match=r"rows\.jsonl, line 2: not JSON"):
        _read(str(file))
    file.write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    with pytest.raises(FormatError, match=r"rows\.jsonl, line \d: not JSON"):
        _read(str(file))
    file.write_text('{"body": "text is here"}\n')
    with pytest.raises(UsageError, match=r"line 1: no text in the field 'text'.*it has: body"):
        _read(str(file))
    assert [d.text for d in _read(str(file), text_field="body")[0].values()] == ["text is here"]


def test_a_data_set_saved_on_disk_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["First row.", "", "Third row."]})
    rows.save_to_disk(str(tmp_path / "rows"))
    found, skipped = _read(f"datasets:{tmp_path / 'rows'}")
    assert [(d.text, d.first_lines) for d in found.values()] == [
        ("First row.", (1,)),
        ("Third row.", (3,)),
    ]
    assert list(skipped.values()) == ["an empty row"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("python-doc", "did you mean 'python-docs'"),
        ("./nowhere", "no such file or folder: ./nowhere"),
    ],
)
def test_a_wrong_source_is_said(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sources.find(spec)


def test_python_topics_come_first_and_cite_their_lines() -> None:
    corpus = sources.find("python-docs")
    assert corpus.root is not None
    found = list(passages(corpus.documents(lambda source, why: None), limit=400))
    assert any(p.title == 'The "with" statement' for p in passages(
        corpus.documents(lambda source, why: None), limit=1500
    ))  # fmt: skip
    file = (corpus.root / "pydoc_data" / "topics.py").read_text()
    lines = file.split("\n")
    for passage in found:
        assert passage.source == "pydoc_data/topics.py"
        cited = " ".join(lines[passage.start_line - 1 : passage.end_line])
        words = re.findall(r"[A-Za-z]{4,}", passage.text)
        assert all(word in cited for word in words), passage.place


def test_docstrings_are_found_without_importing() -> None:
    code = (Path(python_docs.__file__)).read_bytes()
    documents = {d.title: d for d in python_docs.docstring_documents(code, "pkg/python_docs.py")}
    assert "pkg.python_docs.documents" in documents
    assert not any("_by_line" in title for title in documents)
    for document in documents.values():
        source = code.decode().split("\n")
        for line, number in zip(document.text.split("\n"), document.first_lines, strict=True):
            assert (
                line.strip() in source[number - 1].replace("\\n", "\n")
                or "\\" in source[number - 1]
            )


def test_methods_are_part_of_their_class() -> None:
    code = b'''class A(B):
    """About A."""

    def f(
        self,
        x,  # why
    ) -> None:
        """Do f.

            More.
        """

    def _hidden(self):
        """Not shown."""

    def bare(self): "Short."
'''
    (document,) = python_docs.docstring_documents(code, "m.py")
    assert document.title == "m.A"
    assert list(zip(document.text.split("\n"), document.first_lines, strict=True)) == [
        ("class A(B):", 1), ("About A.", 2), ("", 4),
        ("def f(", 4), ("    self,", 5), ("    x,  # why", 6), (") -> None:", 7),
        ("Do f.", 8), ("", 9), ("More.", 10), ("", 16),
        ('def bare(self): "Short."', 16), ("Short.", 16),
    ]  # fmt: skip


@given(st.text(alphabet="ab\n\\\"' é", max_size=40), st.sampled_from(["'''", '"""', "repr"]))
def test_literals_keep_their_value_whatever_their_quotes(text: str, quotes: str) -> None:
    if quotes == "repr":
        code = f"x = {text!r}"
    else:
        escaped = text.replace("\\", "\\\\").replace(quotes[0], f"\\{quotes[0]}")
        code = f"x = {quotes}{escaped}{quotes}"
    node = ast.parse(code).body[0].value  # type: ignore[attr-defined]
    lines = python_docs.literal_lines(code.encode().split(b"\n"), node)
    assert "\n".join(line for line, _, _ in lines) == text.removesuffix("\n")
    if quotes != "repr":
        assert [first for _, first, _ in lines] == list(range(1, len(lines) + 1))


def test_a_backslash_joins_lines_as_python_does() -> None:
    code = 'x = """one \\\ntwo\nthree"""\ny = "a\\\nb"'
    found = [
        python_docs.literal_lines(code.encode().split(b"\n"), statement.value)  # type: ignore[attr-defined]
        for statement in ast.parse(code).body
    ]
    assert found == [[("one two", 1, 2), ("three", 3, 3)], [("ab", 4, 5)]]


def _pdf(path: Path, *pages: str) -> None:
    """Write a PDF of one line a page, by hand: pypdf reads text and does not write it."""
    numbers = [4 + 2 * i for i in range(len(pages))]
    parts = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Count {len(pages)} /Kids "
        f"[{' '.join(f'{n} 0 R' for n in numbers)}] >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, text in zip(numbers, pages, strict=True):
        shown = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET".encode() if text else b""
        parts += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {number + 1} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>".encode(),
            b"<< /Length %d >>\nstream\n%s\nendstream" % (len(shown), shown),
        ]
    data, offsets = b"%PDF-1.4\n", []
    for number, part in enumerate(parts, start=1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, part)
    rows = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(parts) + 1
    data += b"xref\n0 %d\n0000000000 65535 f \n%s" % (size, rows)
    data += b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (
        size, data.index(b"xref"),
    )  # fmt: skip
    path.write_bytes(data)


def test_the_lines_of_a_pdf_are_its_pages(tmp_path: Path) -> None:
    pytest.importorskip("pypdf")
    _pdf(tmp_path / "paper.pdf", "Quinces ripen late.", "Medlars are eaten soft.")
    _pdf(tmp_path / "scan.pdf", "")
    (tmp_path / "torn.pdf").write_bytes(b"%PDF-1.4 and then nothing")
    skipped: list[tuple[str, str]] = []
    corpus = sources.find(str(tmp_path))
    (document,) = corpus.documents(lambda source, why: skipped.append((source, why)))
    assert (document.source, document.title) == ("paper.pdf", "paper")
    places = [(p.text, p.place) for p in split(document, words=5)]
    assert places == [
        ("Quinces ripen late.", "paper.pdf:1"), ("Medlars are eaten soft.", "paper.pdf:2"),
    ]  # fmt: skip
    assert [source for source, _ in skipped] == ["scan.pdf", "torn.pdf"]
    assert "without text" in skipped[0][1]


def test_without_the_reader_a_pdf_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pdf(tmp_path / "paper.pdf", "Quinces ripen late.")
    monkeypatch.setitem(sys.modules, "pypdf", None)
    skipped: list[tuple[str, str]] = []
    assert list(sources.find(str(tmp_path)).documents(lambda *told: skipped.append(told))) == []
    assert "pip install 'toolkit[pdf]'" in skipped[0][1]
    with pytest.raises(MissingExtraError, match=r"toolkit\[pdf\]"):
        list(sources.find(str(tmp_path / "paper.pdf")).documents(lambda *told: None))
