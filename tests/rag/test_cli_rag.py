"""toolkit rag from the outside: what it prints, and what it says when it cannot."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from toolkit.cli import rag as cli
from toolkit.cli.rag import ask as asking
from toolkit.errors import FormatError, ToolkitError, UsageError
from toolkit.rag import Message


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def _fails(*arguments: object) -> ToolkitError:
    result = _run(*arguments)
    assert isinstance(result.exception, ToolkitError), result.output
    return result.exception


class _Fake:
    def stream(self, messages: Sequence[Message], *, max_tokens: int = 256) -> Iterator[str]:
        yield "Collect snails by hand"
        yield " at night [1][7]."


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "generator", lambda *_: _Fake())


def test_build_search_and_ask(
    garden: Path, tiny_dir: Path, tmp_path: Path, fake: None
) -> None:  # fmt: skip
    path = tmp_path / "index"
    built = _run("build", garden, "-o", path, "--encoder", tiny_dir, "--words", 12)
    assert built.exit_code == 0, built.output
    assert "a search looks into 1" in built.stdout
    assert "not text" in built.stdout
    found = _run("search", path, "snails", "-k", 2)
    assert found.exit_code == 0
    assert "nearest to snails" in found.stdout
    asked = _run("ask", path, "How do I fight snails?", "--timeline", tmp_path / "t.json")
    assert asked.exit_code == 0, asked.output
    assert "Collect snails by hand at night [1].\n" in asked.stdout
    assert "written" in asked.stdout
    assert "measured: embed" in asked.stdout
    assert (tmp_path / "t.json").is_file()


def test_json_is_one_object_on_stdout(
    garden: Path, tiny_dir: Path, tmp_path: Path, fake: None
) -> None:  # fmt: skip
    path = tmp_path / "index"
    built = json.loads(
        _run("build", garden, "-o", path, "--encoder", tiny_dir, "--limit", 3, "--json").stdout
    )
    assert (built["num_passages"], built["num_lists"]) == (3, 1)
    hits = json.loads(_run("search", path, "snails", "-k", 2, "--json").stdout)
    assert len(hits) == 2
    assert set(hits[0]) >= {"score", "id", "source", "start_line", "end_line", "text"}
    answer = json.loads(_run("ask", path, "Snails?", "--json").stdout)
    assert answer["text"] == "Collect snails by hand at night [1]."
    assert answer["citations"][0]["how"] == "written"
    assert [span["name"] for span in answer["timeline"]] == ["embed query", "search", "generate"]
    measured = json.loads(_run("eval", path, "--json", "-k", 2).stdout)
    assert measured["measured"][-1]["recall"] == 1.0


def test_errors_are_one_clear_sentence(
    garden: Path, tiny_dir: Path, garden_index: Path, tmp_path: Path
) -> None:
    error = _fails("search", tmp_path, "x")
    assert isinstance(error, UsageError)
    assert "no index in" in str(error)
    assert "toolkit rag build SOURCE -o" in str(error)
    assert "no such file or folder" in str(_fails("build", "./nowhere", "-o", tmp_path / "a"))
    wrong = _fails("build", garden, "-o", tmp_path / "a", "--encoder", "minilm-6")
    assert "did you mean 'minilm-l6'" in str(wrong)
    empty = tmp_path / "empty"
    empty.mkdir()
    nothing = _fails("build", empty, "-o", tmp_path / "a", "--encoder", tiny_dir)
    assert "nothing to index" in str(nothing)
    assert "cannot read" in str(_fails("eval", garden_index, "--queries", tmp_path / "none.txt"))
    down = _fails("ask", garden_index, "x", "--url", "http://127.0.0.1:9", "--model", "m")
    assert down.kind == "endpoint"
    assert "no model server answers" in str(down)

    torn = Path(shutil.copytree(garden_index, tmp_path / "torn"))
    (lists,) = torn.glob("s-*/lists.bin")
    lists.write_bytes(lists.read_bytes()[:100])
    error = _fails("search", torn, "x")
    assert isinstance(error, FormatError)
    assert "lists.bin is torn" in str(error)


def test_a_missing_encoder_is_said(garden: Path, tiny_dir: Path, tmp_path: Path) -> None:
    encoder = Path(shutil.copytree(tiny_dir, tmp_path / "encoder"))
    path = tmp_path / "index"
    assert _run("build", garden, "-o", path, "--encoder", encoder).exit_code == 0
    shutil.rmtree(encoder)
    assert "no such file or folder" in str(_fails("search", path, "x"))


def test_help_imports_neither_torch_nor_faiss() -> None:
    code = (
        "import sys; from toolkit.cli.main import load; load('rag');"
        "sys.exit(any(name in sys.modules for name in ('torch', 'faiss', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
