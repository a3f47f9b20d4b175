"""Every command of the command line: JSON, help with an example that parses, and instant help."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from toolkit.cli import main, view

# What makes help slow: none of it may be imported before a command runs.
HEAVY = (
    "torch", "transformers", "datasets", "faiss", "tokenizers", "accelerate", "fastapi", "uvicorn",
    "scipy", "pandas",
)  # fmt: skip
# The list of verbs needs less still: it loads none of their modules.
LIGHT = (*HEAVY, "numpy", "networkx", "pydantic")


def commands(verb):
    """Return (words after `toolkit`, command) of every command under `verb`."""
    loaded = main.load(verb)
    found = []

    def walk(words, command):
        inner = getattr(command, "commands", None)
        if inner is None:
            found.append((words, command))
            return
        for name, each in inner.items():
            walk((*words, name), each)

    walk((verb,), loaded)
    return found


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "toolkit", *arguments],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def imported_by(*arguments):
    """Run the command line in a process of its own; return its exit code and what it imported."""
    code = (
        "import sys\n"
        "from toolkit.cli.main import main\n"
        f"sys.argv = ['toolkit', *{list(arguments)!r}]\n"
        "code = 0\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as stop:\n"
        "    code = stop.code\n"
        "print('MODULES', code or 0, *sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    line = done.stdout.rpartition("MODULES ")[2].split()
    assert line, done.stderr
    return int(line[0]), set(line[1:])


@pytest.mark.parametrize("verb", main.VERBS)
def test_every_command_prints_json_when_asked(verb):
    for words, command in commands(verb):
        options = {option for parameter in command.params for option in parameter.opts}
        assert "--json" in options, f"toolkit {' '.join(words)} has no --json"


@pytest.mark.parametrize("verb", main.VERBS)
def test_every_command_has_help_with_an_example(verb, monkeypatch):
    # Wide enough that an example is not wrapped.
    monkeypatch.setenv("COLUMNS", "400")
    for words, command in commands(verb):
        result = CliRunner().invoke(main.app, [*words, "--help"], prog_name="toolkit")
        assert result.exit_code == 0, f"toolkit {' '.join(words)} --help: {result.output}"
        assert example(command), f"toolkit {' '.join(words)} --help shows no example"
        assert "Example:" in result.output


@pytest.mark.parametrize("verb", main.VERBS)
def test_every_example_is_a_command_line_that_parses(verb):
    for words, command in commands(verb):
        shown = shlex.split(example(command))
        assert shown[: 1 + len(words)] == ["toolkit", *words], shown
        try:
            command.make_context("toolkit", shown[1 + len(words) :]).close()
        except Exception as error:
            # The files of an example need not be here; its options and arguments must be right.
            if "does not exist" not in str(error):
                raise AssertionError(f"{shlex.join(shown)}: {error}") from error


def example(command):
    """Return the command line that the help of `command` gives as its example, or ""."""
    found = re.search(r"Example: (toolkit .*?)\s*(?:\n\s*\n|\Z)", command.help or "", re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def test_the_list_of_verbs_imports_none_of_them():
    code, modules = imported_by("--help")
    assert code == 0
    assert not modules & set(LIGHT)
    assert not modules & {module for module, _ in main.VERBS.values()}


@pytest.mark.parametrize("verb", main.VERBS)
def test_help_of_a_verb_imports_nothing_heavy(verb):
    for words in {(verb,), *(words for words, _ in commands(verb))}:
        code, modules = imported_by(*words, "--help")
        assert code == 0
        assert not modules & set(HEAVY), f"toolkit {' '.join(words)} --help"


@pytest.mark.parametrize("verb", main.VERBS)
def test_a_verb_says_in_the_list_what_it_does(verb):
    _, text = main.VERBS[verb]
    assert text.endswith(".")
    assert text in " ".join(run("--help").stdout.replace("│", " ").split())


def test_the_version_is_the_packages():
    import toolkit

    assert run("--version").stdout == f"toolkit {toolkit.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["timelin"], "timeline"),
        (["hardwre", "list"], "hardware"),
        (["timeline", "shwo"], "show"),
        (["timeline", "show", "--jsn"], "--json"),
    ],
)
def test_a_wrong_word_is_answered_with_the_nearest(arguments, nearest):
    done = run(*arguments)
    assert done.returncode == 2
    assert nearest in done.stderr
    assert "Traceback" not in done.stderr


def test_errors_are_json_where_json_was_asked_for(tmp_path):
    done = run("timeline", "show", str(tmp_path / "none.json"), "--json")
    assert done.returncode == 2
    error = json.loads(done.stderr)["error"]
    assert error["kind"] == "usage"
    assert "no such file" in error["message"]


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    from toolkit.timeline import Span, Timeline, files

    files.save(
        Timeline("t", tuple(Span(f"s{at}", f"t{at}", 0, 1) for at in range(5000))),
        tmp_path / "t.json",
    )
    command = f"{shlex.quote(sys.executable)} -m toolkit timeline show {tmp_path}/t.json --json"
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -1; exit ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout == "{\n"
    assert done.stderr == ""


def test_a_table_shows_square_brackets_as_they_are(monkeypatch, capsys):
    monkeypatch.setattr(view, "out", Console(width=100))
    view.emit({}, as_json=False, render=lambda: view.table("t", ["c"], [["toolkit[serve]"]]))
    assert "toolkit[serve]" in capsys.readouterr().out
