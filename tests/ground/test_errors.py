import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from toolkit import errors
from toolkit.cli import view
from toolkit.errors import MissingExtraError, ToolkitError, UsageError, unknown_name


def test_each_kind_of_error_has_its_exit_code():
    codes = {
        kind.__name__: kind.exit_code
        for kind in (ToolkitError, *ToolkitError.__subclasses__())
        if kind.__module__ == "toolkit.errors"
    }
    assert codes == {
        "ToolkitError": 1,
        "UsageError": 2,
        "InfeasibleError": 3,
        "FormatError": 1,
        "MissingExtraError": 1,
    }


def test_kinds_tell_machines_the_errors_apart():
    kinds = [kind.kind for kind in (ToolkitError, *ToolkitError.__subclasses__())]
    assert len(kinds) == len(set(kinds))


def test_an_error_reads_as_a_sentence_and_its_remedy():
    assert str(ToolkitError("no room", remedy="free some")) == "no room; free some"
    assert str(ToolkitError("no room")) == "no room"


def test_a_near_name_is_suggested_and_a_far_one_lists_what_is_known():
    near = str(unknown_name("device", "h10", ["l4", "h200", "h100"]))
    assert near == "unknown device 'h10'; did you mean 'h100'?"
    assert "'planar' or 'plans'" in str(unknown_name("verb", "plana", ["planar", "plans", "rag"]))
    assert str(unknown_name("device", "zzz", ["b", "a"])) == "unknown device 'zzz'; known: a, b"
    assert str(unknown_name("device", "zzz", [])).endswith("known: none")
    assert str(unknown_name("op", "zzz", map(str, range(50)))).endswith(", ...")


@given(st.text(), st.lists(st.text(), max_size=30))
def test_a_wrong_name_is_always_a_usage_error_that_repeats_it(name, known):
    error = unknown_name("thing", name, known)
    assert isinstance(error, UsageError)
    assert repr(name) in str(error)


def test_a_missing_extra_names_the_module_and_the_command():
    with pytest.raises(MissingExtraError) as raised:
        errors.require("no_such_module_anywhere", extra="serve")
    assert "no_such_module_anywhere" in raised.value.message
    assert raised.value.remedy == "install it with: pip install 'toolkit[serve]'"


def test_a_missing_extra_names_what_is_missing_inside_a_module(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import absent_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError, match="'absent_dependency' is not installed"):
        errors.require("half_installed", extra="rag")


def test_square_brackets_survive_being_shown(monkeypatch, capsys):
    monkeypatch.setattr(view, "err", Console(stderr=True, width=200))
    view.show_error(
        ToolkitError("shape [2, 3]", remedy="pip install 'toolkit[rag]'"), as_json=False
    )
    shown = capsys.readouterr().err
    assert "shape [2, 3]" in shown
    assert "'toolkit[rag]'" in shown


def test_an_error_as_json_is_one_object(capsys):
    view.show_error(UsageError("no", remedy="yes"), as_json=True)
    assert json.loads(capsys.readouterr().err) == {
        "error": {"kind": "usage", "message": "no", "remedy": "yes"}
    }


def test_the_command_line_shows_one_message_and_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "toolkit", "timeline", "show", str(tmp_path / "none.json")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: no such file")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
