"""`toolkit hardware`: its tables, its JSON, and its errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from toolkit.cli.hardware import app
from toolkit.errors import UsageError
from toolkit.hardware import measured, probe

runner = CliRunner()


def call(*words):
    done = runner.invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_list():
    text = call("list")
    for name in ("h100-sxm", "mi300x", "dgx2"):
        assert name in text
    value = json.loads(call("list", "--json"))
    names = {row["name"] for row in value["devices"]}
    assert {"v100-32g", "generic-cpu"} <= names
    assert all(row["source"] and row["figures"] == "datasheet" for row in value["devices"])


def test_show_device():
    assert "datasheet, dense" in call("show", "h100")
    value = json.loads(call("show", "H100", "--json"))
    assert value["name"] == "h100-sxm"
    assert value["peak_flops"]["bfloat16"] == pytest.approx(989.4e12)


def test_show_cluster():
    text = call("show", "16xdgx2")
    assert "devices 256" in text
    assert "predicted" in text
    value = json.loads(call("show", "2xh100x8", "--json"))
    assert (value["num_devices"], value["num_nodes"]) == (16, 2)
    assert all(row["predicted_s"] > 0 and row["algorithm"] for row in value["collectives"])
    assert json.loads(call("show", "h100x1", "--json"))["collectives"] == []


def test_show_file(tmp_path):
    path = tmp_path / "two.toml"
    path.write_text('[[nodes]]\nmachine = "h100x8"\n[[nodes]]\nmachine = "a100x8"\n')
    assert json.loads(call("show", str(path), "--json"))["num_devices"] == 16


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["show", "h10"], "unknown device or cluster 'h10'; did you mean 'h100'"),
        (["show", "h100x9"], "one dgx-h100 holds 8"),
        (["show", "none.toml"], "no such file"),
        (["show", "none.json"], "no such file"),
        (["show", "this"], "has not been probed"),
    ],
)
def test_errors(words, says):
    with pytest.raises(UsageError, match=says):
        runner.invoke(app, words, catch_exceptions=False)


def test_errors_of_the_command_exit_2_as_text_and_json():
    command = [sys.executable, "-m", "toolkit.cli.main", "hardware", "show", "h10"]
    code = "from toolkit.cli.main import main; import sys; sys.argv[0] = 'toolkit'; main()"
    for extra in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *command[3:], *extra],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert "did you mean 'h100'" in done.stderr.replace('\\"', '"')
        assert "Traceback" not in done.stderr
        if extra:
            assert json.loads(done.stderr)["error"]["kind"] == "usage"


def test_probe_writes_a_row_and_says_what_is_missing(monkeypatch, tmp_path):
    def quick(options, on_part):
        assert options.quick
        on_part(0, 1, "disk")
        result = probe.Result(
            {
                "fingerprint": vars(measured.Fingerprint.here()),
                "probed_at": "2026-01-01T00:00:00+00:00",
                "quick": True,
                "load_average": 0.5,
                "memory_bytes": 2**33,
                "op_overhead_s": None,
                "threads": [
                    {
                        "num_threads": 1,
                        "gemm_flops": {"float32": 9e10, "int8": None},
                        "memory_bandwidth": 1e10,
                    }
                ],
                "disk": None,
                "collectives": [],
                "collective_points": {},
                "accelerators": [],
            }
        )
        result.not_measured["disk"] = "OSError: no direct reads"
        return result

    monkeypatch.setattr(probe, "run", quick)
    text = call("probe", "--quick")
    assert "not measured" in text
    assert "no direct reads" in text
    assert measured.default_path().is_file()
    assert "measured" in call("show", "this")
    assert "this" in call("list")
    path = tmp_path / "other.json"
    value = json.loads(call("probe", "--quick", "--output", str(path), "--json"))
    assert value["path"] == str(path)
    assert value["not_measured"] == {"disk": "OSError: no direct reads"}
    assert json.loads(call("show", str(path), "--json"))["figures"] == "measured"


def test_help_has_examples_and_imports_no_torch():
    for command in ("list", "show", "probe"):
        assert "Example: toolkit hardware" in call(command, "--help")
    code = "import toolkit.cli.hardware, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
