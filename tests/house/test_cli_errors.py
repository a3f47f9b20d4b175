"""What goes wrong on the command line is one message: the file, what is wrong, what to do."""

from __future__ import annotations

import json
import sys

import pytest

from toolkit import record
from toolkit.cli import main as command_line

# A command that reads a file: its arguments with {} for the file, the record's kind, its version.
READERS = [
    (["graph", "show", "{}"], "graph"),
    (["graph", "diff", "{}", "{}"], "graph"),
    (["plan", "show", "{}"], "plan"),
    (["plan", "simulate", "{}", "-o", "{}.out"], "plan"),
    (["plan", "verify", "{}"], "plan"),
    (["timeline", "show", "{}"], "timeline"),
    (["timeline", "export", "{}", "-o", "{}.html"], "timeline"),
]

# The version this toolkit reads, where it is not the first.
VERSIONS = {"plan": 2}

# A wrong name, and the name that was meant.
MISTYPED = [
    (["hardware", "show", "h10"], "h100"),
    (["models", "show", "gpt-tinny"], "gpt-tiny"),
    (["models", "get", "smollm2-135"], "smollm2-135m"),
    (["trace", "gpt-tinny"], "gpt-tiny"),
    (["graph", "show", "gpt-tinny"], "gpt-tiny"),
    (["serve", "simulate", "llama-tinny"], "llama-tiny"),
    (["serve", "simulate", "llama-tiny", "--system", "auot"], "auto"),
    (["serve", "simulate", "llama-tiny", "--workload", "mixd"], "mixed"),
    (["plan", "make", "gpt-tiny", "--strategy", "fsdpp", "-o", "p.json"], "fsdp"),
    (["plan", "make", "gpt-tiny", "--cluster", "h10x8", "-o", "p.json"], "h100"),
    (["rag", "build", "python-dcs", "-o", "index"], "python-docs"),
]

# A command whose extra is missing: the module taken away, and the extra to be named.
EXTRAS = [
    (["rag", "build", "python-docs", "-o", "{}"], "faiss", "rag"),
    (["serve", "run", "smollm2-135m"], "fastapi", "serve"),
    (["serve", "run", "smollm2-135m"], "uvicorn", "serve"),
]


def run(monkeypatch, capsys, arguments, *, code):
    """Run `toolkit *arguments` as `main` would; return what it says on stderr."""
    monkeypatch.setattr(sys, "argv", ["toolkit", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    said = capsys.readouterr().err
    assert stopped.value.code == code, said
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(("arguments", "kind"), READERS, ids=" ".join)
class TestFiles:
    def test_missing(self, arguments, kind, tmp_path, monkeypatch, capsys):
        path = str(tmp_path / "missing.json")
        said = run(monkeypatch, capsys, [a.replace("{}", path) for a in arguments], code=2)
        assert "missing.json" in said.replace("\n", "")

    def test_corrupt(self, arguments, kind, tmp_path, monkeypatch, capsys):
        path = tmp_path / "torn.json"
        path.write_text('{"format": "toolkit/' + kind)
        said = run(monkeypatch, capsys, [a.replace("{}", str(path)) for a in arguments], code=1)
        assert "torn.json" in said.replace("\n", "")
        assert "corrupt" in said

    def test_another_version(self, arguments, kind, tmp_path, monkeypatch, capsys):
        path = tmp_path / "old.json"
        record.write(path, kind=kind, version=999, body={})
        said = run(monkeypatch, capsys, [a.replace("{}", str(path)) for a in arguments], code=1)
        assert "version 999" in said
        assert f"version {VERSIONS.get(kind, 1)}" in said

    def test_another_kind(self, arguments, kind, tmp_path, monkeypatch, capsys):
        path = tmp_path / "other.json"
        record.write(path, kind="something", version=1, body={})
        said = run(monkeypatch, capsys, [a.replace("{}", str(path)) for a in arguments], code=1)
        assert f"not a {kind} file" in said.replace("\n", " ")

    def test_edited(self, arguments, kind, tmp_path, monkeypatch, capsys):
        path = tmp_path / "edited.json"
        record.write(path, kind=kind, version=VERSIONS.get(kind, 1), body={"a": 1})
        path.write_text(path.read_text().replace('"a": 1', '"a": 2'))
        said = run(monkeypatch, capsys, [a.replace("{}", str(path)) for a in arguments], code=1)
        assert "digest" in said


@pytest.mark.parametrize(("arguments", "meant"), MISTYPED, ids=str)
def test_a_wrong_name_brings_the_nearest(arguments, meant, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = run(monkeypatch, capsys, [*arguments, "--json"], code=2)
    error = json.loads(said.strip().splitlines()[-1])["error"]
    assert error["kind"] == "usage"
    assert meant in f"{error['message']} {error['remedy']}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "module", "extra"), EXTRAS, ids=str)
def test_a_missing_extra_names_the_command(arguments, module, extra, tmp_path, monkeypatch, capsys):
    # None in sys.modules is how Python itself marks a module that must not be imported.
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    arguments = [a.replace("{}", str(tmp_path / "out")) for a in arguments]
    said = run(monkeypatch, capsys, arguments, code=1)
    assert f"pip install 'toolkit[{extra}]'" in said.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_an_error_is_one_object_with_json(tmp_path, monkeypatch, capsys):
    arguments = ["plan", "show", str(tmp_path / "none.json"), "--json"]
    error = json.loads(run(monkeypatch, capsys, arguments, code=2))["error"]
    assert set(error) == {"kind", "message", "remedy"}


def test_what_a_bug_raises_is_not_hidden(monkeypatch):
    """Only the errors meant for users become a message; ours keep their traceback."""

    def broken():
        raise KeyError("ours")

    monkeypatch.setattr(command_line, "app", broken)
    with pytest.raises(KeyError):
        command_line.main()
