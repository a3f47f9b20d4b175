"""The trace and graph commands, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from toolkit.cli import graph as graph_cli
from toolkit.cli import trace as trace_cli
from toolkit.errors import FormatError, UsageError

runner = CliRunner()


def run(app, *args):
    found = runner.invoke(app, list(args), env={"COLUMNS": "160"})
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    for name, tokens in (("a", 16), ("b", 32)):
        run(trace_cli.app, "gpt-tiny", "-o", str(folder / f"{name}.json"), "--batch", "2",
            "--tokens", str(tokens))  # fmt: skip
    return folder


def test_trace_writes_a_file_and_says_what_it_costs(tmp_path):
    path = tmp_path / "graph.json"
    found = run(trace_cli.app, "gpt-tiny", "--tokens", "16", "-o", str(path), "--json")
    value = json.loads(found.stdout)
    assert value["sizes"] == {"batch": 1, "tokens": 16}
    assert value["num_parameters"] == 891_648
    assert value["digest"] == json.loads(path.read_text())["digest"]
    assert value["backward_flops"] > value["forward_flops"] > 0


def test_show_folds_layers_and_evaluates_elsewhere(files):
    found = run(graph_cli.app, "show", str(files / "a.json"), "--depth", "2")
    assert "x 4" in found.stdout
    assert "predicted" in found.stdout
    again = run(graph_cli.app, "show", str(files / "a.json"), "--at", "tokens=32", "--json")
    other = run(graph_cli.app, "show", str(files / "b.json"), "--json")
    assert json.loads(again.stdout) == json.loads(other.stdout)
    step = run(graph_cli.app, "show", str(files / "a.json"), "--at", "tokens=1", "--at",
               "context=64", "--json")  # fmt: skip
    assert json.loads(step.stdout)["sizes"] == {"batch": 2, "tokens": 1, "context": 64}


def test_diff_exits_as_diff_does(files):
    a, b = str(files / "a.json"), str(files / "b.json")
    same = run(graph_cli.app, "diff", a, a)
    # A line breaks where the paths' lengths have it.
    assert (same.exit_code, "compute the same" in " ".join(same.stdout.split())) == (0, True)
    differ = run(graph_cli.app, "diff", a, b)
    assert differ.exit_code == 1
    assert "blocks.*.attention.query" in differ.stdout
    assert "predicted" in differ.stdout
    # At one size they are one graph.
    assert run(graph_cli.app, "diff", a, b, "--at", "tokens=8").exit_code == 0


def test_diff_tells_what_a_change_costs(files, tmp_path):
    import torch
    from torch import nn

    from toolkit import ir

    class Model(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 4)) for _ in range(3)
            )

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return x

    for name, width in (("a", 8), ("b", 16)):
        ir.trace(Model(width), (torch.zeros(2, 4),), name=name).save(tmp_path / f"{name}.json")
    found = run(graph_cli.app, "diff", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--json")
    value = json.loads(found.stdout)
    assert (found.exit_code, value["equal"]) == (1, False)
    changes = {change["path"]: change for change in value["changes"]}
    second = changes["layers.*.2"]
    assert second["paths"] == ["layers.0.2", "layers.1.2", "layers.2.2"]
    assert second["num_parameters"] == 4 * 8
    assert second["forward_flops"] == 2 * 2 * 4 * 8
    assert "parameter weight: float32 4x16" in second["added"]
    assert "parameter weight: float32 4x8" in second["removed"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("gpt-tny",), "did you mean"),
        (("gpt-tiny", "--dtype", "float31"), "did you mean 'float32'"),
        (("gpt-tiny", "--size", "tokens"), "is not a size"),
        (("swin-nano", "--tokens", "8"), "size of swin-nano"),
    ],
)
def test_wrong_requests_are_told(args, message):
    with pytest.raises(UsageError, match=message):
        run(trace_cli.app, *args)


def test_wrong_files_are_told(files, tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        run(graph_cli.app, "show", str(tmp_path / "none.json"))
    torn = tmp_path / "torn.json"
    torn.write_text((files / "a.json").read_text()[:1000])
    with pytest.raises(FormatError, match="corrupt"):
        run(graph_cli.app, "show", str(torn))


def test_help_imports_no_torch_and_has_examples():
    code = (
        "import sys; from toolkit.cli import graph, trace; from typer.testing import CliRunner\n"
        "for app, args in ((trace.app, ['--help']), (graph.app, ['show', '--help']),"
        " (graph.app, ['diff', '--help'])):\n"
        "    text = CliRunner().invoke(app, args).output\n"
        "    assert 'Example: toolkit' in text, text\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
