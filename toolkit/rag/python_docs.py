"""The corpus every CPython carries: `pydoc_data.topics` and the standard library's docstrings.

Sources are parsed, never imported, and every line of text keeps the line of the file it is on.
"""

from __future__ import annotations

import ast
import inspect
import io
import os
import sysconfig
import textwrap
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

from toolkit.errors import ToolkitError
from toolkit.rag.corpus import Document, Line

# Tests, vendored and dead code, and the data file that is read by itself.
_LEFT_OUT = {
    "__pycache__", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages",
    "dist-packages", "test", "tests", "turtledemo", "idle_test", "_pyrepl",
}  # fmt: skip


def root() -> Path:
    """Return the folder of the standard library's sources."""
    return Path(sysconfig.get_paths()["stdlib"])


def documents(folder: Path, skipped: Callable[[str, str], None]) -> Iterator[Document]:
    """Yield the language topics first, then the modules by path. Sources are below `folder`."""
    topics = folder / "pydoc_data" / "topics.py"
    if topics.is_file():
        yield from topic_documents(topics.read_bytes(), "pydoc_data/topics.py")
    else:
        # Some distributions leave it out of their minimal Python packages.
        skipped("pydoc_data/topics.py", "this Python has no such file")
    for source in _modules(folder):
        try:
            yield from docstring_documents((folder / source).read_bytes(), source)
        except (SyntaxError, OSError, ValueError) as error:
            skipped(source, str(error))


def _modules(folder: Path) -> list[str]:
    """Return the public modules' paths relative to `folder`, sorted."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _LEFT_OUT and not _private(name)]
        found += [
            (Path(place) / name).relative_to(folder).as_posix()
            for name in files
            if name.endswith(".py") and not _private(name)
        ]
    return sorted(found)


def topic_documents(code: bytes, source: str) -> Iterator[Document]:
    """Yield one document a language topic ("with", "assert", ...), titled by its first line."""
    lines = code.split(b"\n")
    for statement in ast.parse(code).body:
        if not (isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict)):
            continue
        for key, value in zip(statement.value.keys, statement.value.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                text = _dedented(literal_lines(lines, value))
                if text:
                    yield Document.of_lines(source, text[0][0].strip(), text)
        return
    raise ToolkitError(f"{source} holds no dictionary of topics")


def docstring_documents(code: bytes, source: str) -> Iterator[Document]:
    """Yield a document for the module and for each public top-level function and class.

    A class's document holds its methods too: each signature as written, then its docstring.
    """
    lines = code.split(b"\n")
    module = ast.parse(code)
    name = source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    text = _docstring(lines, module)
    if text:
        yield Document.of_lines(source, name, text)
    for node in module.body:
        text = _described(lines, node)
        if text and isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield Document.of_lines(source, f"{name}.{node.name}", text)


def _described(lines: list[bytes], node: ast.stmt) -> list[Line]:
    """Return signature and docstring of a public definition and of those inside it."""
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return []
    if _private(node.name):
        return []
    found = _docstring(lines, node)
    if found:
        first, last = node.lineno, node.body[0].lineno - 1
        # The signature is on its own lines, except in `def f(): "doc"`.
        numbers = range(first, max(first, last) + 1)
        head = textwrap.dedent("\n".join(lines[n - 1].decode() for n in numbers)).split("\n")
        found = [*zip(head, numbers, numbers, strict=True), *found]
    if isinstance(node, ast.ClassDef):
        for member in node.body:
            inner = _described(lines, member)
            if inner:
                found += [("", inner[0][1], inner[0][1]), *inner]
    return found


def _private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith(("__", "__.py")))


def _docstring(
    lines: list[bytes], node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
) -> list[Line]:
    """Return the lines of a definition's docstring, indentation removed as `inspect` does."""
    first = node.body[0] if node.body else None
    if not (isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)):
        return []
    if not isinstance(first.value.value, str):
        return []
    return _dedented(literal_lines(lines, first.value))


def _dedented(text: list[Line]) -> list[Line]:
    """Remove common indentation, and blank lines at both ends (as `inspect.cleandoc`)."""
    filled = [i for i, line in enumerate(text) if line[0].strip()]
    if not filled:
        return []
    text = text[filled[0] : filled[-1] + 1]
    clean = inspect.cleandoc("\n".join(line[0] for line in text)).split("\n")
    return [
        (line.rstrip(), first, last) for line, (_, first, last) in zip(clean, text, strict=True)
    ]


def literal_lines(lines: list[bytes], node: ast.Constant) -> list[Line]:
    r"""Return the lines of a string literal's value, each with the source lines it stands on.

    `lines` are the file's lines, UTF-8; the literal may be triple-quoted or a chain of strings.

    >>> code = b"x = ('one\\n'\n     'two\\n')"
    >>> node = ast.parse(code).body[0].value
    >>> literal_lines(code.split(b"\n"), node)
    [('one', 1, 1), ('two', 2, 2)]
    """
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    found = lines[first : last + 1]
    found[-1] = found[-1][: node.end_col_offset]
    found[0] = found[0][node.col_offset :]
    code = b"\n".join(found).decode()
    out: list[Line] = []
    text, first_line = "", node.lineno
    # The brackets let strings on several lines be one expression, as they are in the file.
    for token in tokenize.generate_tokens(io.StringIO(f"({code})").readline):
        if token.type != tokenize.STRING:
            continue
        for value, offset in _by_line(token.string):
            number = node.lineno + token.start[0] - 1 + offset
            *ended, rest = value.split("\n")
            for part in ended:
                out.append((text + part, first_line if text else number, number))
                text = ""
            first_line = first_line if text else number
            text += rest
    if text:
        out.append((text, first_line, number))
    return out


def _by_line(token: str) -> Iterator[tuple[str, int]]:
    """Yield (value, line offset) for each physical line of one string token."""
    quote_at = min(token.find(mark) for mark in "'\"" if mark in token)
    prefix, body = token[:quote_at], token[quote_at:]
    if "\n" not in token:
        yield ast.literal_eval(token), 0
        return
    quotes = 3 * body[0]
    width = 3 if body.startswith(quotes) else 1  # 1: a string that a backslash carries on
    inside = body[width:-width].split("\n")
    for offset, part in enumerate(inside):
        final = offset == len(inside) - 1
        # Evaluated between newlines of its own, so that no quote at its end can close it; an odd
        # number of backslashes before the newline joins the lines, unless raw, as in Python.
        value = ast.literal_eval(f"{prefix}{quotes}\n{part}\n{quotes}")[1:]
        joined = not value.endswith("\n")
        yield (value.removesuffix("\n") if final or joined else value), offset
