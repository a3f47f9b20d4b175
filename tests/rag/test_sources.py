"""Folders, files, HTML, JSONL, data sets and Python's own documentation become documents."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import FormatError, UsageError
from toolkit.rag import python_docs, sources
from toolkit.rag.corpus import Document, passages


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
